"""Reordering heads and units in the middle of a run: whatever mirrors a weight moves with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_nas.callbacks._networks import copies_of
from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet import Permutation, Supernet, permute_like

__all__ = ["put_in_order", "unsortable"]

_OTHER_SHAPES = ("Adafactor", "LBFGS", "SOAP", "Shampoo", "ZeroRedundancyOptimizer")
_REMEDY = "order at the start (warmup=0) or not at all (order=None)"


def unsortable(trainer: Trainer) -> str | None:
    """Why weights cannot be reordered once the optimizer has taken a step, and what to do; None if they can."""
    names = {base.__name__ for optimizer in trainer.optimizers for base in type(optimizer).__mro__}
    found = sorted(names.intersection(_OTHER_SHAPES))
    if "FSDP" in type(trainer.strategy).__name__:
        found.append(type(trainer.strategy).__name__)
    if not found:
        return None
    return (
        f"{', '.join(found)} keeps state that is not shaped like its parameters, so heads and units cannot be "
        f"reordered in the middle of the run; {_REMEDY}"
    )


def put_in_order(
    supernet: Supernet, scores: Mapping[str, Tensor], trainer: Trainer, pl_module: LightningModule
) -> None:
    """Move the units with the highest scores to the front; no output changes, nor any later step.

    With each weight move its gradient, what the optimizers remember of it, and the same weight of every copy of
    the network in the module and the callbacks (EMA, SWA).

    Raises:
        UnsupportedError: if an optimizer remembers something of another shape; nothing has changed then.
    """
    names = {parameter: name for name, parameter in supernet.model.named_parameters()}
    twins = [
        dict(copy.named_parameters()) for copy in copies_of(supernet.model, pl_module, trainer.callbacks)
    ]
    for parameter, name in names.items():
        for member in (parameter, *(twin[name] for twin in twins)):
            for _ in _remembered(trainer.optimizers, member):  # raises before the first change
                pass
    for parameter, permutations in supernet.reorder(scores).items():
        for twin in twins:
            copy = twin[names[parameter]]
            permute_like(copy.data, permutations)
            if copy.grad is not None:
                permute_like(copy.grad, permutations)
        for member in (parameter, *(twin[names[parameter]] for twin in twins)):
            _permute_remembered(trainer.optimizers, member, permutations)


def _permute_remembered(
    optimizers: Sequence[torch.optim.Optimizer], parameter: nn.Parameter, permutations: list[Permutation]
) -> None:
    for tensor in _remembered(optimizers, parameter):
        permute_like(tensor, permutations)


def _remembered(optimizers: Sequence[torch.optim.Optimizer], parameter: nn.Parameter) -> list[Tensor]:
    """What the optimizers keep for each entry of a parameter: moments, momentum."""
    found = []
    for optimizer in optimizers:
        for name, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.numel() <= 1:
                continue
            if value.shape != parameter.shape:
                raise UnsupportedError(
                    f"SupernetTraining: {type(optimizer).__name__} keeps {name!r} of shape {tuple(value.shape)} "
                    f"for a parameter of shape {tuple(parameter.shape)}, so it cannot be reordered in the middle "
                    f"of the run; {_REMEDY}."
                )
            found.append(value)
    return found
