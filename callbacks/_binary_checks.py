"""What may be wrong with a run of binary layers, found before its first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from lightning_nas.callbacks._lightning import finds_unused_parameters
from lightning_nas.callbacks._stages import Stage
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_nas.binary import BinaryLayer
from lightning_nas.errors import UnsupportedError

__all__ = ["refuse_bad_scales", "refuse_unused", "stale_copy", "untrained"]

_WHERE = "Binarization"


def refuse_bad_scales(found: Mapping[str, BinaryLayer]) -> None:
    """Refuse scales that are not finite.

    Raises:
        ValueError: naming the layer.
    """
    for name, layer in found.items():
        scales = {"weight scale": layer.scale, "input scale": getattr(layer, "input_scale", None)}
        for what, scale in scales.items():
            if scale is not None and not bool(torch.isfinite(scale).all()):
                raise ValueError(
                    f"{_WHERE}: the {what} of {name} is not finite. Load sound weights (was the checkpoint "
                    "saved after the run had diverged?), or leave the layer out with exclude=."
                )


def untrained(optimizers: Iterable[torch.optim.Optimizer], found: Mapping[str, BinaryLayer]) -> list[str]:
    """Names of weights and scales of binary layers that no optimizer will change."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [
        f"{name}.{own}"
        for name, layer in found.items()
        for own, parameter in layer.named_parameters(recurse=False)
        if own != "bias" and not (parameter.requires_grad and id(parameter) in held)
    ]


def refuse_unused(trainer: Trainer, found: Iterable[BinaryLayer], stages: Sequence[Stage]) -> None:
    """Under DDP, refuse stages in which learned scales have no part, unless it looks for such.

    Raises:
        UnsupportedError: with the remedy.
    """
    if trainer.world_size == 1 or finds_unused_parameters(trainer):
        return
    are_real = {name for _, codes in stages for name, bits in codes.items() if bits == 32}
    unused = {
        name
        for layer in found
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.requires_grad
        and (
            (name == "weight_scale" and "weights" in are_real)
            or (name.startswith("input_") and "activations" in are_real)
        )
    }
    if unused:
        raise UnsupportedError(
            f"{_WHERE}: there are stages in which {' and '.join(sorted(unused))} of layers have no part, and "
            "DDP waits for their gradients. Use strategy='ddp_find_unused_parameters_true'."
        )


def stale_copy(callbacks: Iterable[Callback], pl_module: LightningModule) -> str | None:
    """The averaging callback whose copy of the module lacks a tensor that the module has now."""
    for callback in callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            for value in vars(callback).values():
                if isinstance(value, nn.Module):
                    copied = {name.removeprefix("module.") for name in value.state_dict()}
                    if pl_module.state_dict().keys() - copied:
                        return type(callback).__name__
    return None
