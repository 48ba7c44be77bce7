"""Products of codes: sums of integers, exact, whatever precision the network runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["binary_matmul", "outside_autocast"]


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside this context products are not cast: bfloat16 has not all integers above 256."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def binary_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of two tensors of codes, exact: in float32 at least, also under autocast.

    Scales come after it: ``binary_matmul(q, k.mT) * (q_scale * k_scale / sqrt(d))``.

    Args:
        a: codes ``(..., n, k)``; k below 2 ** 24.
        b: codes ``(..., k, m)``.

    Returns:
        ``(..., n, m)``.
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with outside_autocast(a.device):
        return torch.matmul(a.to(wide), b.to(wide))
