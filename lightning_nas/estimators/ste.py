"""The straight-through estimator, with and without a clip."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nas.estimators._estimator import Estimator, check_positive, estimators

__all__ = ["STE", "Identity", "ste_slope"]


def ste_slope(x: Tensor, clip: float | None = 1.0) -> Tensor:
    """1 where ``|x| <= clip``, else 0; 1 everywhere for a clip of None. Same shape and dtype as ``x``.

    The edge is written out: the derivative of ``torch.clamp`` there differs between releases of PyTorch.
    """
    return torch.ones_like(x) if clip is None else (x.abs() <= clip).to(x.dtype)


@estimators.register("ste")
class STE(Estimator):
    """The straight-through estimator: ``s(x) = 1`` where ``|x| <= clip``, else 0.

    Args:
        clip: where gradients end, the edge included; None: nowhere (identity).

    Raises:
        ValueError: if ``clip`` is not above 0.

    Example:
        >>> x = torch.tensor([-2.0, 0.0, 0.5], requires_grad=True)
        >>> STE()(x).tolist()
        [-1.0, 1.0, 1.0]

    Reference: Hubara et al., Binarized Neural Networks, NeurIPS 2016, section 1.3.
    """

    def __init__(self, clip: float | None = 1.0) -> None:
        super().__init__()
        if clip is not None:
            check_positive("STE", clip=clip)
        self.clip = clip

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    @override
    def slope(self, x: Tensor) -> Tensor:
        return ste_slope(x, self.clip)

    @override
    def extra_repr(self) -> str:
        return f"clip={self.clip}"


@estimators.register("identity")
class Identity(STE):
    """The straight-through estimator without an end: ``s(x) = 1``.

    Reference: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013.
    """

    def __init__(self) -> None:
        super().__init__(clip=None)

    @override
    def extra_repr(self) -> str:
        return ""
