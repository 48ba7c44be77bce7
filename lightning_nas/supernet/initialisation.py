"""Weights to start training from scratch with."""

from __future__ import annotations

import torch
from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet.families import family_of

__all__ = ["zero_residual_branches"]


def zero_residual_branches(model: nn.Module) -> tuple[str, ...]:
    """Let every residual block begin as the identity: the last norm, or linear layer, of its branch is zero.

    For training from scratch, before the run: a supernet of blocks that begin so can train at the full
    learning rate. On pretrained weights it would throw away what they know.

    Args:
        model: of a family that knows where its branches end: timm's ResNets, EfficientNets, MobileNets and
            vision transformers. Changed in place.

    Returns:
        The names of the layers whose weight and bias are zero now.

    Raises:
        UnsupportedError: for another family, or if the model is elastic already.

    Example:
        >>> import timm
        >>> zero_residual_branches(timm.create_model("resnet18"))[:2]
        ('layer1.0.bn2', 'layer1.1.bn2')

    Reference: Yu et al., BigNAS, ECCV 2020, section 3.2 (of the norm's gamma).
    """
    family = family_of(model)
    ends = family.anatomy(model).branch_ends
    if not ends:
        raise UnsupportedError(
            f"zero_residual_branches: the family {family.name!r} does not say where its residual branches "
            "end. Set the last norm of each branch to zero yourself, before training."
        )
    with torch.no_grad():
        for name in ends:
            for parameter in model.get_submodule(name).parameters(recurse=False):
                parameter.zero_()
    return ends
