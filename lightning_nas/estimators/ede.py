"""IR-Net's error decay estimator: a tanh that steepens over the run."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nas.estimators._estimator import Estimator, check_positive, estimators, wide

__all__ = ["EDE", "ede_slope"]


def ede_slope(x: Tensor, t: Tensor | float, k: Tensor | float) -> Tensor:
    """``k t (1 - tanh(t x)^2)``; same shape and dtype as ``x``."""
    return (k * t * (1 - torch.tanh(t * wide(x)).square())).to(x.dtype)


@estimators.register("ede")
class EDE(Estimator):
    """The error decay estimator of IR-Net: ``s(x) = k t (1 - tanh(t x)^2)``.

    Its schedule raises ``t`` from ``start`` to ``end``, evenly in its logarithm, with ``k = max(1 / t, 1)``:
    from nearly the identity to nearly the sign.

    Args:
        t: steepness until a schedule sets it.
        k: height until then; None: ``max(1 / t, 1)``.
        start: of the schedule.
        end: of the schedule.

    Raises:
        ValueError: if one is not above 0.

    Reference: Qin et al., IR-Net, CVPR 2020, section 3.3, eq. 11 to 13.
    """

    t: Tensor
    k: Tensor

    def __init__(self, t: float = 1.0, k: float | None = None, start: float = 0.1, end: float = 10.0) -> None:
        super().__init__()
        check_positive("EDE", t=t, start=start, end=end, k=1.0 if k is None else k)
        self.start, self.end = start, end
        self._state(t=t, k=max(1 / t, 1.0) if k is None else k)

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        return self.k * torch.tanh(self.t * wide(x))

    @override
    def slope(self, x: Tensor) -> Tensor:
        return ede_slope(x, self.t, self.k)

    @override
    def schedule(self, progress: float) -> None:
        super().schedule(progress)
        t = self.start ** (1 - progress) * self.end**progress
        self.t.fill_(t)
        self.k.fill_(max(1 / t, 1.0))

    @override
    def extra_repr(self) -> str:
        return f"t={self.t.item():.4g}, k={self.k.item():.4g}, start={self.start}, end={self.end}"
