"""Scales: what a product of codes is multiplied with, so that it is near the product of real numbers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["least_squares_scale", "mean_magnitude", "power_of_two", "window_magnitude"]


def mean_magnitude(weight: Tensor, per: Literal["channel", "layer"] = "channel") -> Tensor:
    r"""The best factor of :math:`\mathrm{sign}(W)`: :math:`\alpha = \mathrm{mean}|W|`.

    It minimises :math:`\lVert W - \alpha\,\mathrm{sign}(W) \rVert^2`, and leaves
    :math:`\lVert W \rVert_2^2 - \lVert W \rVert_1^2 / n`.

    Args:
        weight: ``(out, ...)``.
        per: a factor for each output channel, ``(out,)``, or one for all, ``()``.

    Reference: Rastegari et al., XNOR-Net, ECCV 2016, equation 6.
    """
    magnitude = weight.abs()  # owns its memory: of a slice it is summed as of a copy, to the last bit
    return magnitude.mean() if per == "layer" else magnitude.flatten(1).mean(1)


def power_of_two(scale: Tensor) -> Tensor:
    r""":math:`2^{\mathrm{round}(\log_2 s)}`, without a gradient: multiplying is a shift of bits.

    Reference: Qin et al., IR-Net, CVPR 2020, equation 6.
    """
    return torch.exp2(torch.log2(scale.detach().clamp(min=2.0**-60)).round())


def window_magnitude(x: Tensor, kernel_size: tuple[int, ...], **geometry: Any) -> Tensor:
    r"""The mean of :math:`|x|` over the inputs that each output of a convolution sees, without a gradient.

    Args:
        x: ``(batch, channels, *space)``, one or two dimensions of space.
        kernel_size: of the convolution, one size a dimension.
        **geometry: its ``stride``, ``padding`` and ``dilation``; what is padded counts as 0.

    Returns:
        ``(batch, 1, *output space)``.

    Reference: Rastegari et al., XNOR-Net, ECCV 2016, section 3.2.
    """
    convolve = F.conv1d if len(kernel_size) == 1 else F.conv2d
    box = x.new_ones(1, 1, *kernel_size)
    mean: Tensor = convolve(x.detach().abs().mean(1, keepdim=True), box / box.numel(), **geometry)
    return mean


def least_squares_scale(x: Tensor, is_unsigned: bool) -> Tensor:
    r"""The factor of an input's codes with the least squared error.

    Of codes -1 and +1 it is :math:`\mathrm{mean}|x|`. Of codes 0 and 1, which are 1 above half of it, it is
    the mean of what lies above; found by Lloyd's iteration from twice the mean. (BiT starts at 2 and 4 times
    the mean.)

    Args:
        x: any shape.
        is_unsigned: whether codes are {0, 1}.

    Returns:
        A scalar, at least 1e-5.
    """
    x = x.detach()
    if not is_unsigned:
        return x.abs().mean().clamp(min=1e-5)
    scale = 2 * x.mean()
    for _ in range(20):
        above = x > scale / 2
        scale = torch.where(above, x, 0.0).sum() / above.sum().clamp(min=1)
    return scale.clamp(min=1e-5)
