"""Once-for-all's kernel transformation: a smaller kernel is a linear map of the larger one's centre."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nas.errors import NASError, UnsupportedError
from lightning_nas.supernet.layers import Cut, Elastic, take

__all__ = ["add_kernel_transforms", "matrices_of", "read_transformed", "transformed_kernel"]


def add_kernel_transforms(model: nn.Module) -> nn.Module:
    r"""Give each convolution of elastic kernel size the matrices that make its smaller kernels.

    The 5 x 5 kernel is :math:`M_{75}` times the centre of the 7 x 7, the 3 x 3 kernel :math:`M_{53}` times
    the centre of that 5 x 5, each kernel as a vector and one matrix for all channels of a layer. The
    matrices begin as the identity, which is the plain centre. They are new parameters
    (``"blocks.1.0.conv_dw.kernel_7to5"``), so call this where the network is made, before an optimizer or
    a :class:`~lightning_nas.Supernet` sees it. The whole network does not use them: DDP needs
    ``find_unused_parameters=True``. Extracted networks have plain kernels, and none of them.

    Example:
        >>> import timm
        >>> model = add_kernel_transforms(timm.create_model("mobilenetv3_large_100"))
        >>> model.blocks[2][0].conv_dw.kernel_5to3.shape
        torch.Size([9, 9])

    Args:
        model: a network of a family with elastic kernels; changed in place. A second call changes nothing.

    Returns:
        The model.

    Raises:
        NASError: if the network is elastic already.
        UnsupportedError: for a network without elastic kernels, or of no supported family.

    Reference: Cai et al., Once-for-All, ICLR 2020, section 3.3.
    """
    from lightning_nas.supernet.families import family_of  # families import what is here

    if any(isinstance(module, Elastic) for module in model.modules()):
        raise NASError(
            "add_kernel_transforms: this network has a supernet already. Call it where the network is made."
        )
    anatomy = family_of(model).anatomy(model)
    elastic = {
        part.module
        for part in anatomy.parts
        for axis in part.axes.get("weight", ())
        for segment in axis
        if segment.centred and segment.group is not None
    }
    if not elastic:
        raise UnsupportedError(
            f"add_kernel_transforms: no kernel of this {type(model).__name__} is elastic; kernels larger "
            "than 3 of depthwise convolutions are."
        )
    for name in elastic:
        conv: Any = model.get_submodule(name)
        for size in range(conv.kernel_size[0] - 2, 1, -2):
            if (matrix := _name(size)) not in conv._parameters:
                eye = torch.eye(size**2, dtype=conv.weight.dtype, device=conv.weight.device)
                conv.register_parameter(matrix, nn.Parameter(eye))
    return model


def transformed_kernel(weight: Tensor, size: int, matrices: dict[int, Tensor]) -> Tensor:
    """A kernel of a smaller size, made in steps of 2.

    Args:
        weight: ``(out, in, kernel, kernel)``.
        size: to make; odd as the kernel is.
        matrices: for each size on the way ``(size ** 2, size ** 2)``.

    Returns:
        ``(out, in, size, size)``.
    """
    for smaller in range(weight.shape[-1] - 2, size - 1, -2):
        centre = weight[..., 1:-1, 1:-1]
        if smaller in matrices:
            centre = F.linear(centre.flatten(-2), matrices[smaller]).unflatten(-1, (smaller, smaller))
        weight = centre
    return weight


def matrices_of(module: nn.Module) -> dict[str, Tensor]:
    """The matrices of a convolution by their names; empty where it has none."""
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if name.startswith("kernel_") and parameter is not None
    }


def read_transformed(conv: nn.Module, weight: Tensor, cut: Cut) -> Tensor:
    """The weight of a convolution with matrices: its channels are cut, then its kernel is transformed."""
    rows, columns, side, _ = cut or (None,) * 4
    channels = take(weight, (rows, columns))
    if side is None:
        return channels
    ((_, size),) = cast("tuple[tuple[int, int]]", side)  # the centre: where it begins, and its length
    matrices = {int(matrix.shape[0] ** 0.5): matrix for matrix in matrices_of(conv).values()}
    return transformed_kernel(channels, size, matrices)


def _name(size: int) -> str:
    return f"kernel_{size + 2}to{size}"
