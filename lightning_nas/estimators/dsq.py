"""Differentiable soft quantization with one bit: a tanh that reaches the ends of its range."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nas.estimators._estimator import Estimator, check_positive, estimators, wide

__all__ = ["DSQ", "dsq_slope"]


def _height_and_steepness(alpha: float, clip: float) -> tuple[float, float]:
    return 1 / (1 - alpha), math.atanh(1 - alpha) / clip


def dsq_slope(x: Tensor, alpha: float = 0.2, clip: float = 1.0) -> Tensor:
    """``S k (1 - tanh(k x)^2)`` where ``|x| <= clip``, else 0; same shape and dtype as ``x``.

    ``S = 1 / (1 - alpha)`` and ``k = atanh(1 - alpha) / clip``, so that ``S tanh(k x)`` ends at -1 and +1.
    """
    height, steepness = _height_and_steepness(alpha, clip)
    rise = height * steepness * (1 - torch.tanh(steepness * wide(x)).square())
    return torch.where(x.abs() <= clip, rise, 0.0).to(x.dtype)


@estimators.register("dsq")
class DSQ(Estimator):
    """Differentiable soft quantization with one bit; :func:`dsq_slope` has its formula.

    Range and ``alpha`` are fixed here; in the paper they are learned.

    Args:
        alpha: how far from a step the soft function is, in (0, 1).
        clip: half the range.

    Raises:
        ValueError: if one is out of range.

    Reference: Gong et al., Differentiable Soft Quantization, ICCV 2019, section 3.1.
    """

    def __init__(self, alpha: float = 0.2, clip: float = 1.0) -> None:
        super().__init__()
        check_positive("DSQ", clip=clip)
        if not 0 < alpha < 1:
            raise ValueError(f"DSQ: alpha must be in (0, 1), got {alpha}.")
        self.alpha, self.clip = alpha, clip

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        height, steepness = _height_and_steepness(self.alpha, self.clip)
        return height * torch.tanh(steepness * wide(x).clamp(-self.clip, self.clip))

    @override
    def slope(self, x: Tensor) -> Tensor:
        return dsq_slope(x, self.alpha, self.clip)

    @override
    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, clip={self.clip}"
