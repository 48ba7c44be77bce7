"""BiT's elastic binarization: codes of a scale that is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_nas.estimators._estimator import sign, straight_through, wide

__all__ = ["Elastic", "elastic_codes", "scale_gradient"]


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` forward; backward, the gradient times a factor."""
    return x.detach() + (x - x.detach()) * factor


def elastic_codes(x: Tensor, scale: Tensor, levels: tuple[int, ...] = (-1, 1)) -> Tensor:
    """The codes that a learned scale rounds to, so that ``scale * codes`` has the gradients of the method.

    With ``v = x / scale``: the levels (-1, 1) are ``sign(x)``; whole numbers in a row, such as (0, 1) or
    (-1, 0, 1), are ``round(v)``, ties to even, within the levels. Of ``y = scale * codes`` the gradient to
    ``x`` is 1 within the levels and 0 outside; that to ``scale`` is the code outside, ``round(v) - v``
    inside, and the code for (-1, 1).

    Args:
        x: any shape.
        scale: above 0, broadcasts against ``x``.
        levels: in rising order.

    Raises:
        ValueError: for other levels.

    Reference: Liu et al., BiT, NeurIPS 2022, section 3.2; Esser et al., LSQ, ICLR 2020.
    """
    is_sign = levels == (-1, 1)
    if not is_sign and (len(levels) < 2 or levels != tuple(range(levels[0], levels[-1] + 1))):
        raise ValueError(
            f"elastic_codes: levels must be (-1, 1) or whole numbers in a row such as (0, 1), got {levels}."
        )
    low, high = levels[0], levels[-1]
    scale = scale.clamp(min=1e-5)
    ratio = wide(x) / (scale.detach() if is_sign else scale)
    codes = sign(wide(x)) if is_sign else ratio.detach().round().clamp(low, high)
    inside = (ratio.detach() >= low) & (ratio.detach() <= high)
    return straight_through(ratio, codes, inside).to(x.dtype)


class Elastic(nn.Module):
    """Codes of one bit with a learned scale and, if wanted, a learned shift for each channel.

    The module gives codes; whoever uses them multiplies with :attr:`scale` after the integer product. The
    scale starts at the first batch in training mode: twice the mean size of the entries, or four times it for
    codes of 0 and 1.

    Args:
        signed: codes -1 and +1; else 0 and 1, for what is never negative.
        channels: length of the last dimension, for a shift that is added first; None: no shift.

    Reference: Liu et al., BiT, NeurIPS 2022, section 3.2.
    """

    is_started: Tensor

    def __init__(self, signed: bool = True, channels: int | None = None) -> None:
        super().__init__()
        self.signed, self.levels = signed, ((-1, 1) if signed else (0, 1))
        self.size = nn.Parameter(torch.ones(()))
        self.shift = None if channels is None else nn.Parameter(torch.zeros(channels))
        self.register_buffer("is_started", torch.tensor(False))
        self._factor = 1.0  # of the scale's gradient, by the size of the last input
        self._may_start = True  # a flag of Python's, so that no step waits for the device

    @property
    def scale(self) -> Tensor:
        """What codes are to be multiplied with, a scalar above 0; to be read after the forward."""
        size = scale_gradient(self.size, self._factor)
        return straight_through(size, size.clamp(min=1e-5), None)  # below 0 it can still come back

    def forward(self, x: Tensor) -> Tensor:
        """Codes of the shape and dtype of ``x``."""
        if self.shift is not None:
            x = x + self.shift.to(x.dtype)
        if self.training and self._may_start:
            self._start(x.detach())
        self._factor = 1 / math.sqrt(x.numel())
        return elastic_codes(x, self.scale, self.levels)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        first = wide(x).abs().mean() * (2.0 if self.signed else 4.0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(first)  # each process sees another batch
            first /= torch.distributed.get_world_size()
        self.size.copy_(torch.where(self.is_started, self.size, first.clamp(min=1e-5)))
        self.is_started.fill_(True)
        self._may_start = False

    @override
    def extra_repr(self) -> str:
        shift = "" if self.shift is None else f", channels={len(self.shift)}"
        return f"signed={self.signed}{shift}"
