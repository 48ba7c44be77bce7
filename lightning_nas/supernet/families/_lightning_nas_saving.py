"""The networks of :mod:`lightning_nas.models` as plain data: the arguments that they were made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_nas import models
from lightning_nas.errors import UnsupportedError
from lightning_nas.saving import Description, SavedFamily, saved_families

_CLASSES: dict[str, type[nn.Module]] = {"ResNet": models.ResNet, "VGGSmall": models.VGGSmall}


def supports(model: nn.Module) -> bool:
    """Whether the module is one of these classes; a subclass may compute anything."""
    return type(model) in _CLASSES.values()


def describe(model: Any, shared: Mapping[str, str]) -> Description:
    """The class and its arguments.

    Raises:
        UnsupportedError: for a network that was changed since it was made.
    """
    network = {"class": type(model).__name__, "arguments": model.arguments}
    with torch.device("meta"):
        twin = build(network)
    ours, theirs = _anatomy(model), _anatomy(twin)
    for name in {**theirs, **ours}:
        if ours.get(name) != theirs.get(name):
            raise UnsupportedError(
                f"nas.save: {name!r} is {ours.get(name)}, where {type(model).__name__} makes it "
                f"{theirs.get(name)}; a network changed in this way cannot be rebuilt."
            )
    return Description(network, "import lightning_nas; model = lightning_nas.load(folder)")


def build(network: Mapping[str, Any]) -> nn.Module:
    """The network that :func:`describe` described, its weights still to be loaded."""
    return _CLASSES[network["class"]](**network["arguments"])


def _anatomy(model: nn.Module) -> dict[str, str]:
    """Each layer as it prints itself and each tensor's shape, by name."""
    layers = {name: f"{type(m).__name__}({m.extra_repr()})" for name, m in model.named_modules() if name}
    return {**layers, **{name: str([*tensor.shape]) for name, tensor in model.state_dict().items()}}


saved_families.register("lightning_nas")(
    SavedFamily("those of lightning_nas.models", "lightning-nas", supports, describe, build)
)
