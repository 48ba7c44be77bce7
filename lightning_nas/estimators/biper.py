"""BiPer: weights that are binarized by a square wave instead of a step."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nas.estimators._estimator import (
    Estimator,
    check_positive,
    estimators,
    sign,
    wide,
    with_slope,
)

__all__ = ["BiPer", "biper_slope", "sine_penalty"]


def biper_slope(x: Tensor, frequency: float = 20.0) -> Tensor:
    """``frequency cos(frequency x)``; same shape and dtype as ``x``."""
    return (frequency * torch.cos(frequency * wide(x))).to(x.dtype)


@estimators.register("biper")
class BiPer(Estimator):
    """Binary periodic function, for weights: the square wave ``sign(sin(frequency x))``.

    ``s(x) = frequency cos(frequency x)``. In its first stage the sine itself is the forward, so that the
    network is not binary yet; its schedule leaves the stages to whoever trains.

    Args:
        frequency: of the wave, in radians per unit of ``x``.
        stage: 1 for the sine, 2 for the square wave.

    Raises:
        ValueError: for a frequency that is not above 0, or another stage.

    Reference: Vargas et al., BiPer, CVPR 2024, section 3.
    """

    def __init__(self, frequency: float = 20.0, stage: int = 2) -> None:
        super().__init__()
        check_positive("BiPer", frequency=frequency)
        if stage not in (1, 2):
            raise ValueError(f"BiPer: stage must be 1 (the sine) or 2 (the square wave), got {stage}.")
        self.frequency, self.stage = frequency, stage

    @property
    @override
    def is_binary(self) -> bool:
        return self.stage == 2

    @override
    def forward(self, x: Tensor) -> Tensor:
        """In stage 2 codes, in stage 1 the sine, of the shape and dtype of ``x``."""
        if self.stage == 1:
            return self.surrogate(x).to(x.dtype)
        return with_slope(x, sign(self.surrogate(x.detach())).to(x.dtype), self.slope)

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * wide(x))

    @override
    def slope(self, x: Tensor) -> Tensor:
        return biper_slope(x, self.frequency)

    @override
    def extra_repr(self) -> str:
        return f"frequency={self.frequency}, stage={self.stage}"


def sine_penalty(weight: Tensor, frequency: float = 20.0) -> Tensor:
    """``mean(sin(frequency w)^2)``: BiPer's penalty for one layer, a scalar in [0, 1].

    Reference: Vargas et al., BiPer, CVPR 2024, section 3.3.
    """
    return torch.sin(frequency * wide(weight)).square().mean()
