"""Functions between binary layers, with learned shifts: RSign and RPReLU."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_nas.estimators import Estimator, estimator_named

__all__ = ["RPReLU", "RSign", "rprelu"]


class RSign(nn.Module):
    r"""Codes of -1 and +1 with a learned threshold for each channel: :math:`\mathrm{sign}(x - \beta_c)`.

    The gradient of the threshold is :math:`-\sum g\,s(x - \beta_c)`, with the estimator's slope s.

    Args:
        channels: how many.
        dim: the dimension they are in: 1 of feature maps, -1 of tokens.
        estimator: the rule of the gradient.

    Shapes: any that has ``channels`` entries in ``dim``, in and out.

    Reference: Liu et al., ReActNet, ECCV 2020, section 4.2. Thresholds begin at 0.
    """

    def __init__(self, channels: int, dim: int = 1, estimator: str | Estimator = "bireal") -> None:
        super().__init__()
        self.dim, self.estimator = dim, copy.deepcopy(estimator_named(estimator))
        self.threshold = nn.Parameter(torch.zeros(channels))

    @override
    def forward(self, x: Tensor) -> Tensor:
        codes: Tensor = self.estimator(x - _along(self.threshold, x, self.dim))
        return codes

    @override
    def extra_repr(self) -> str:
        return f"{len(self.threshold)}, dim={self.dim}"


def rprelu(x: Tensor, shift: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    r"""A PReLU moved to any point: :math:`\zeta` plus :math:`x - \gamma`, times a where that is negative.

    Args:
        x: any shape.
        shift: :math:`\gamma`, broadcasts against ``x`` as the next two do.
        slope: a.
        offset: :math:`\zeta`.

    Reference: Liu et al., ReActNet, ECCV 2020, equation 6.
    """
    moved = x - shift
    return torch.where(moved > 0, moved, slope * moved) + offset


class RPReLU(nn.Module):
    """:func:`rprelu` with learned parameters for each channel: shift and offset begin at 0, slope at 0.25.

    Args:
        channels: how many.
        dim: the dimension they are in: 1 of feature maps, -1 of tokens.

    Shapes: any that has ``channels`` entries in ``dim``, in and out.
    """

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.shift = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.offset = nn.Parameter(torch.zeros(channels))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return rprelu(x, *(_along(p, x, self.dim) for p in (self.shift, self.slope, self.offset)))

    @override
    def extra_repr(self) -> str:
        return f"{len(self.shift)}, dim={self.dim}"


def _along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    return values.view(-1, *(1,) * (x.ndim - 1 - dim % x.ndim))
