"""What is done to latent weights before their codes are taken; gradients flow through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TREATMENTS", "ReCU", "centred", "standardised"]


def centred(weight: Tensor) -> Tensor:
    """Each output channel without its mean: as many codes are +1 as -1 where weights are symmetric.

    Args:
        weight: ``(out, ...)``.
    """
    rows = weight.flatten(1)
    return (rows - rows.mean(1, keepdim=True)).view_as(weight)


def standardised(weight: Tensor, eps: float = 1e-5) -> Tensor:
    r"""Each output channel with mean 0 and deviation 1: :math:`(W - \mu) / (\sigma + \epsilon)`.

    Args:
        weight: ``(out, ...)``; more than one weight a channel, for the deviation is the unbiased one.
        eps: what a constant channel is divided by. The paper has none, and gets NaN there.

    Reference: Qin et al., IR-Net, CVPR 2020, equation 4.
    """
    rows = weight.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    # not rows.std(): its gradient at a constant channel is NaN
    variance = rows.square().sum(1, keepdim=True) / (rows.shape[1] - 1)
    deviation = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)
    return (rows / (deviation + eps)).view_as(weight)


@dataclass(frozen=True)
class ReCU:
    r"""Standardised weights, their tails pulled in: clamped at the quantile :math:`Q_\tau` of a Laplace law.

    A channel gets the deviation :math:`2\sqrt{2}`, of a Laplace law with b = 2, and is clamped to
    :math:`\pm Q_\tau`, :math:`Q_\tau = -b \ln(2 - 2\tau)`, :math:`b = \mathrm{mean}|W|`. A clamped weight
    gets a gradient only through mean and deviation, which move it back to where signs flip.

    Args:
        tau: the quantile, in (0.5, 1); the paper moves it from 0.85 to 0.99.

    Raises:
        ValueError: if ``tau`` is out of range.

    Reference: Xu et al., ReCU, ICCV 2021, equations 9 and 10. There b is one number a layer.
    """

    tau: float = 0.99

    def __post_init__(self) -> None:
        if not 0.5 < self.tau < 1:
            raise ValueError(f"ReCU: tau must be in (0.5, 1), got {self.tau}.")

    def __call__(self, weight: Tensor) -> Tensor:
        """The treated weight, of the same shape."""
        scaled = standardised(weight).flatten(1) * math.sqrt(8)
        limit = -math.log(2 - 2 * self.tau) * scaled.detach().abs().mean(1, keepdim=True)
        return torch.minimum(torch.maximum(scaled, -limit), limit).view_as(weight)


TREATMENTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "centred": centred,
    "standardised": standardised,
    "recu": ReCU(),
}
