"""Reordering heads and units in the middle of a run: whatever mirrors a weight moves with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning_nas.callbacks._lightning import callbacks_of
from lightning_nas.callbacks._networks import copies_of, named_tensors
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet import Supernet, permute_like

__all__ = ["put_in_order", "unsortable"]

_OTHER_SHAPES = ("Adafactor", "LBFGS", "SOAP", "Shampoo", "ZeroRedundancyOptimizer")
_REMEDY = "order at the start (warmup=0) or not at all (order=None)"
_SHARDED = (
    "has sharded the weights, so heads and units cannot be reordered in the run; order before it with "
    "nas.Supernet(network, order=..., calibration=...) or not at all (order=None)"
)


def unsortable(trainer: Trainer, at_start: bool) -> str | None:
    """Why weights cannot be reordered in this run, and what to do; None if they can.

    Args:
        trainer: with its optimizers.
        at_start: whether the order is made before the first optimizer step.
    """
    if "FSDP" in type(trainer.strategy).__name__:
        return f"{type(trainer.strategy).__name__} {_SHARDED}"
    names = {base.__name__ for optimizer in trainer.optimizers for base in type(optimizer).__mro__}
    found = sorted(names.intersection(_OTHER_SHAPES))
    if at_start or not found:
        return None
    return (
        f"{', '.join(found)} keeps state that is not shaped like its parameters, so heads and units cannot "
        f"be reordered in the middle of the run; {_REMEDY}"
    )


def put_in_order(
    supernet: Supernet,
    scores: Mapping[str, Tensor],
    trainer: Trainer,
    pl_module: LightningModule,
    *,
    at_end: bool = False,
) -> None:
    """Move the units with the highest scores to the front; no output changes, nor any later step.

    With each weight move its gradient, what the optimizers remember of it, and the same weight of every copy
    of the network in the module and the callbacks (EMA, SWA); with batch-norm statistics those of the copies.
    ``at_end``: no step follows, so what an optimizer remembers in another shape may stay.

    Raises:
        UnsupportedError: if an optimizer remembers something of another shape; nothing has changed then.
    """
    copies = copies_of(supernet.model, pl_module, callbacks_of(trainer))
    twins = [_named(copy) for copy in copies]
    names = {tensor: name for name, tensor in _named(supernet.model).items()}
    mirrors = {
        tensor: [
            remembered
            for member in (tensor, *(twin[name] for twin in twins))
            for remembered in _remembered(trainer.optimizers, member, skip_others=at_end)
        ]
        for tensor, name in names.items()
    }
    for tensor, name in names.items():
        mirrors[tensor] += named_tensors(name, tensor, supernet.model, pl_module, callbacks_of(trainer))
    for tensor, permutations in supernet.reorder(scores).items():
        for twin in twins:
            copy = twin[names[tensor]]
            mirrors[tensor] += [mirror for mirror in (copy.data, copy.grad) if mirror is not None]
        for mirror in mirrors[tensor]:
            permute_like(mirror, permutations)


def _named(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _remembered(
    optimizers: Sequence[torch.optim.Optimizer], parameter: Tensor, skip_others: bool
) -> list[Tensor]:
    """What the optimizers keep for each entry of a parameter: moments, momentum."""
    found = []
    for optimizer in optimizers:
        for name, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.numel() <= 1:
                continue
            if value.shape == parameter.shape:
                found.append(value)
            elif not skip_others:
                raise UnsupportedError(
                    f"SupernetTraining: {type(optimizer).__name__} keeps {name!r} of shape "
                    f"{tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}, so it cannot "
                    f"be reordered in the middle of the run; {_REMEDY}."
                )
    return found
