"""The rectified straight-through estimator, and the two measures between which it seeks a balance."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nas.estimators._estimator import Estimator, check_positive, estimators, sign, wide

__all__ = ["ReSTE", "estimating_error", "gradient_stability", "reste_slope"]


def reste_slope(x: Tensor, power: Tensor | float, clip: float = 1.5, chord: float = 0.1) -> Tensor:
    """``|x|^((1 - power) / power) / power`` where ``chord < |x| <= clip``, with both ends cut.

    Within the chord it is the slope of the line from ``f(-chord)`` to ``f(chord)`` of the root
    ``f(x) = sign(x) |x|^(1 / power)``, and 0 beyond the clip. Same shape and dtype as ``x``.
    """
    size, exponent = wide(x).abs(), 1 / power - 1
    rise = size.clamp(min=chord) ** exponent  # at least chord: no 0 to a negative power
    rise = torch.where(size <= chord, rise, rise / power)
    return torch.where(size <= clip, rise, 0.0).to(x.dtype)


@estimators.register("reste")
class ReSTE(Estimator):
    """The rectified straight-through estimator: the slope of ``sign(x) |x|^(1 / power)``, cut at both ends.

    A power of 1 is the clipped straight-through estimator, a large one the sign itself. The schedule goes
    from 1 to ``power``, slowly first: ``1 + (1 - cos(pi progress / 2)) (power - 1)``.

    Args:
        power: of the root, at least 1; the end of the schedule, and in force until one is set.
        clip: beyond it there is no gradient.
        chord: half the band around 0 in which the slope is constant, below ``clip``.

    Raises:
        ValueError: if one is out of range.

    Reference: Wu et al., Estimator Meets Equilibrium Perspective, ICCV 2023, section 4.2.
    """

    current: Tensor  # the power in force

    def __init__(self, power: float = 3.0, clip: float = 1.5, chord: float = 0.1) -> None:
        super().__init__()
        check_positive("ReSTE", clip=clip, chord=chord)
        if not (power >= 1 and math.isfinite(power)):
            raise ValueError(f"ReSTE: power must be at least 1, got {power}.")
        if chord >= clip:
            raise ValueError(f"ReSTE: chord must be below clip, got {chord} and {clip}.")
        self.power, self.clip, self.chord = power, clip, chord
        self._state(current=power)

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        size, sides = wide(x).abs().clamp(max=self.clip), sign(x)
        root = size.clamp(min=self.chord) ** (1 / self.current)
        line = size * self.chord ** (1 / self.current - 1)
        return sides * torch.where(size <= self.chord, line, root)

    @override
    def slope(self, x: Tensor) -> Tensor:
        return reste_slope(x, self.current, self.clip, self.chord)

    @override
    def schedule(self, progress: float) -> None:
        super().schedule(progress)
        self.current.fill_(1 + (1 - math.cos(math.pi * progress / 2)) * (self.power - 1))

    @override
    def extra_repr(self) -> str:
        return f"power={self.power}, clip={self.clip}, chord={self.chord}"


@torch.no_grad()
def estimating_error(weight: Tensor, estimator: Estimator) -> Tensor:
    """How far the surrogate is from its sign at the weights of a layer: ``|| f(w) - sign(f(w)) ||_2``.

    A scalar. The sign of ``f(w)`` is that of ``w`` but for a periodic ``f``, whose codes it is as well.

    Reference: Wu et al., ICCV 2023, section 3, eq. 4.
    """
    surrogate = estimator.surrogate(weight)
    error: Tensor = torch.linalg.vector_norm(surrogate - sign(surrogate))
    return error


def gradient_stability(gradient: Tensor) -> Tensor:
    """The unbiased variance of the sizes of a layer's gradients, a scalar: large means unstable.

    Reference: Wu et al., ICCV 2023, section 3, eq. 5.
    """
    return gradient.detach().abs().var()
