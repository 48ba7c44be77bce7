"""Codes as bits, as files hold them: one bit a weight, each row in whole 64-bit words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["LAYOUT", "pack", "unpack"]

LAYOUT = (
    "uint8, one row an output, its weights in the order of the float tensor. Bit 1: the code is negative. "
    "Least significant bit first, rows padded with 0 to whole 64-bit words. Ternary codes have two planes: "
    "is negative, is not 0."
)


def pack(codes: Tensor, is_ternary: bool = False) -> Tensor:
    """The bits of codes, as :data:`LAYOUT` says.

    Args:
        codes: -1 and +1, of ternary ones also 0; ``(out, ...)``, K entries an output, any dtype.
        is_ternary: whether there are two planes.

    Returns:
        uint8, ``(out, 8 * ceil(K / 64))``, of ternary codes ``(2, out, 8 * ceil(K / 64))``.

    Raises:
        ValueError: if an entry is not a code.

    Example:
        >>> pack(torch.tensor([[-1.0, 1.0, -1.0]])).tolist()
        [[5, 0, 0, 0, 0, 0, 0, 0]]
    """
    rows = codes.detach().cpu().flatten(1)
    is_code = (rows == -1) | (rows == 1) | (rows == 0) & is_ternary
    if not bool(is_code.all()):
        known = "-1, 0 and +1" if is_ternary else "-1 and +1"
        raise ValueError(f"pack: {int((~is_code).sum())} entries are not {known}.")
    return torch.stack([_bits(rows < 0), _bits(rows != 0)]) if is_ternary else _bits(rows < 0)


def unpack(bits: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The codes that :func:`pack` packed.

    Args:
        bits: from :func:`pack`.
        shape: of the codes.
        dtype: of the codes.

    Raises:
        ValueError: if the bits are not those of so many codes.
    """
    length = math.prod(shape[1:])
    expected = (shape[0], 8 * math.ceil(length / 64))
    if bits.dtype != torch.uint8 or tuple(bits.shape) not in (expected, (2, *expected)):
        raise ValueError(
            f"unpack: {tuple(shape)} codes take uint8 bits of shape {expected}, ternary ones "
            f"{(2, *expected)}, got {bits.dtype} of {tuple(bits.shape)}."
        )
    planes = np.unpackbits(bits.cpu().numpy(), axis=-1, bitorder="little")
    if planes[..., length:].any():
        raise ValueError("unpack: there are bits behind the end of the rows.")
    negative, *not_zero = torch.from_numpy(planes[..., :length].reshape(-1, *shape))
    codes: Tensor = 1 - 2 * negative.to(dtype)
    if not_zero:
        codes *= not_zero[0].to(dtype)
    return codes


def _bits(plane: Tensor) -> Tensor:
    packed = np.packbits(plane.numpy(), axis=1, bitorder="little")
    return torch.from_numpy(np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))))
