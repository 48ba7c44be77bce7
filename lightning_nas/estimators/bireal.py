"""Bi-Real Net's parabola, and the normalisation of activations that ReCU and BiPer add to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nas.estimators._estimator import Estimator, estimators, sign, wide, with_slope

__all__ = ["BiReal", "bireal_slope", "unit_variance"]


def bireal_slope(x: Tensor) -> Tensor:
    """``max(0, 2 - 2|x|)``; same shape and dtype as ``x``."""
    return (2 - 2 * x.abs()).clamp(min=0)


def unit_variance(x: Tensor) -> Tensor:
    """Each example over the standard deviation of its entries; the mean stays, and so do all signs.

    Args:
        x: ``(batch, ...)``, two dimensions or more.

    Returns:
        Same shape and dtype, ``x / sqrt(var + 1e-5)`` with the unbiased variance; of one entry it is 0.

    Reference: Xu et al., ReCU, ICCV 2021; Vargas et al., BiPer, CVPR 2024.
    """
    correction = min(1, math.prod(x.shape[1:]) - 1)
    variance = wide(x).flatten(1).var(1, correction=correction).view(-1, *(1,) * (x.ndim - 1))
    return (x * torch.rsqrt(variance + 1e-5)).to(x.dtype)


@estimators.register("bireal")
class BiReal(Estimator):
    """The piecewise parabola of Bi-Real Net: ``s(x) = max(0, 2 - 2|x|)``.

    Args:
        normalize: pass the input through :func:`unit_variance` while training, as ReCU and BiPer do with
            activations; the sign is the same.

    Reference: Liu et al., Bi-Real Net, ECCV 2018, section 3.3.
    """

    def __init__(self, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize

    @override
    def forward(self, x: Tensor) -> Tensor:
        scaled = unit_variance(x) if self.normalize and self.training else x
        return with_slope(scaled, sign(x), self.slope)

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        x = x.clamp(-1, 1)
        return 2 * x - x * x.abs()

    @override
    def slope(self, x: Tensor) -> Tensor:
        return bireal_slope(x)

    @override
    def extra_repr(self) -> str:
        return f"normalize={self.normalize}" if self.normalize else ""
