"""A short fine-tuning of one extracted network, taught by the full one, as a plain ``Trainer.fit``."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_nas.callbacks._capture import Call, entry_of
from lightning_nas.callbacks._isolation import copied, muted, same_random_state, undisturbed
from lightning_nas.callbacks._lightning import callbacks_of, takes_batch_idx, uncompiled
from lightning_nas.callbacks._networks import find_network
from lightning_nas.callbacks._teaching import (
    OutputTeaching,
    join,
    outputs_of,
    refuse_other_classes,
    returns_features,
)
from lightning_nas.callbacks.supernet_training import SupernetTraining
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_nas.distillation import OutputReader, Teacher
from lightning_nas.errors import NASError, UnsupportedError
from lightning_nas.results import Candidate
from lightning_nas.space import Architecture
from lightning_nas.supernet import Supernet

__all__ = ["specialize"]


def specialize(
    candidate: Candidate | Architecture,
    trainer: Trainer,
    module: LightningModule,
    datamodule: Any = None,  # whatever Trainer.fit takes first
    *,
    epochs: float = 0.25,
    supernet: Supernet | None = None,
    teacher: nn.Module | None = None,
    weight: float = 0.5,
    temperature: float = 1.0,
    output: OutputReader | None = None,
    head: str | None = None,
) -> nn.Module:
    """Extract one network of a family and fine-tune it for a short while, taught by the full network.

    A copy of the user's module trains, with the small network in the full one's place, by his own
    ``training_step``, data and optimizer. The loss is ``weight * his + (1 - weight) * distance``, where
    distance is ``T^2`` times the cross-entropy to the softened output of the full network, frozen and in
    eval mode. His module, its full network and the supernet stay as they are.

    Example:
        .. code-block:: python

            best = instatune.result.best("val_acc", where={"macs": ("<=", 2e8)})
            small = specialize(best, Trainer(), module, datamodule, epochs=0.25)

    Args:
        candidate: of the search, or an architecture of the space.
        trainer: a fresh one; ``epochs`` sets its length, all else is the user's.
        module: the user's module, in which the supernet lives.
        datamodule: a LightningDataModule or the training loader; None: the module's own ``train_dataloader``.
        epochs: above 0. The data passes ``ceil(epochs)`` times, each time an equal share of it, so that 0.25
            is the first quarter of one pass and 1.5 two passes over three quarters. A limit on batches that
            the Trainer has is the whole that this is a share of.
        supernet: None: that of the callback which trained the module last.
        teacher: None: the full network as it is now; else a network with the same inputs and classes.
        weight: share of the user's loss, in [0, 1].
        temperature: of the softmax, above 0.
        output: reads the logits from what the network (or the head) returns, where that is not plain.
        head: dotted name of a module of yours that turns what the network returns into logits, so that both
            networks are compared by these. The teacher is then a frozen copy of your whole module, which
            runs its own ``training_step``. None: the one of the callback in the module's last run, if any.

    Returns:
        The specialised network, plain.

    Raises:
        ValueError: for an argument out of range, or an architecture of another space.
        UnsupportedError: for a Trainer or a teacher that cannot work.
        NoMatchError: if there is no module with the name of the head.
        NASError: if there is no supernet in the module, it was released, or the module replaces its network
            when training starts.
    """
    faults = []
    if not epochs > 0 or math.isinf(epochs):
        faults.append(f"epochs must be above 0 and finite, got {epochs}")
    if not 0 <= weight <= 1:
        faults.append(f"weight must be in [0, 1], got {weight}")
    if temperature <= 0:
        faults.append(f"temperature must be above 0, got {temperature}")
    if faults:
        raise ValueError(f"specialize: {'; and '.join(faults)}.")
    _refuse(trainer)
    module = getattr(module, "_orig_mod", module)
    supernet = _supernet_in(module) if supernet is None else supernet
    _refuse_outside(supernet, module)
    if head is None and teacher is None:
        head = _head_of(supernet, module)
    if head is not None:
        if teacher is not None:
            raise UnsupportedError(
                f"specialize: with head={head!r} the teacher is your module as it is now, whose head fits no "
                "other network; leave teacher out, or leave head out to compare features."
            )
        find_network(module, head, "specialize")
    architecture = candidate.architecture if isinstance(candidate, Candidate) else candidate
    if not supernet.space.contains(architecture):
        raise ValueError(
            f"specialize: {architecture!r} is not in the space of this supernet ({supernet.space}). Take a "
            "candidate of its own search, or make one with supernet.space.architecture({...})."
        )
    network = supernet.extract(architecture)
    frozen = copy.deepcopy(teacher) if teacher is not None else supernet.extract(supernet.space.largest)
    refuse_other_classes(network, frozen, "specialize")
    student = _with(network, supernet, module)
    taught = _Taught(network, frozen, weight, temperature, output)
    if head is not None:
        taught = _TaughtAtHead(network, _with(frozen, supernet, module), head, weight, temperature, output)
    _set_length(trainer, epochs)
    callbacks_of(trainer).insert(0, taught)
    try:
        trainer.fit(student, datamodule)
    except MisconfigurationException as error:
        if "limit_train_batches" in str(error):
            raise ValueError(f"specialize: epochs={epochs} is less than one batch; give more.") from error
        raise
    return network


class _Taught(OutputTeaching):
    """Lets a frozen network teach the one that trains."""

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module,
        weight: float,
        temperature: float,
        output: OutputReader | None,
    ) -> None:
        super().__init__(output)
        self.network, self.weight, self.rule = network, weight, Teacher(temperature)
        self.teacher = teacher.requires_grad_(False).eval()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(child is self.network for child in pl_module.modules()):
            raise NASError(
                f"specialize: {type(pl_module).__name__} made its network anew when training started, in "
                "setup or configure_model, so the extracted one is gone. Make it there only once: "
                "'if self.network is None: ...'."
            )
        self.watch(self.compared(pl_module), pl_module)
        self.teacher.to(pl_module.device, next(self.network.parameters()).dtype)
        is_features = self._compares_features(pl_module)
        rank_zero_info(
            f"specialize: {self.weight:g} of your loss, {1 - self.weight:g} of the distance to the teacher"
            + (
                ", by features. Where a head of yours makes logits of them, name it: head='...'."
                if is_features
                else "."
            )
        )

    def compared(self, pl_module: LightningModule) -> nn.Module:
        """The module whose outputs are compared."""
        return self.network

    def targets(self, trainer: Trainer, pl_module: LightningModule, calls: list[Call]) -> list[Tensor]:
        """What the teacher says, for each call."""
        return outputs_of(self.teacher, trainer, pl_module, calls, self.read, "specialize")

    def _compares_features(self, pl_module: LightningModule) -> bool:
        return self.compared(pl_module) is self.network and returns_features(self.network)

    @override
    def teach(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, calls: list[Call]) -> None:
        targets = self.targets(trainer, pl_module, calls)
        features = self._compares_features(pl_module)
        loss.register_hook(lambda gradient: gradient * self.weight)

        def distance(output: Tensor, target: Tensor) -> Tensor:
            taught = self.rule(output, target, task=None, strong=None, features=features)
            return (1 - self.weight) * taught

        join(trainer, self.network, calls, targets, distance)


class _TaughtAtHead(_Taught):
    """Lets a frozen copy of the user's module teach, by the logits that its head gives in ``training_step``.

    The copy's step comes before that of the module that trains, on the same batch from the same random state.
    """

    def __init__(self, network: nn.Module, teacher: LightningModule, head: str, *settings: Any) -> None:
        super().__init__(network, teacher, *settings)
        self.module, self.head = teacher, head
        self._said: list[Tensor] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.module.trainer = trainer

        def hear(module: nn.Module, args: Any, output: Any) -> None:
            self._said.append(self.read(output))

        self._undo.callback(self.compared(self.module).register_forward_hook(hear).remove)

    @override
    def compared(self, pl_module: LightningModule) -> nn.Module:
        found = find_network(pl_module, self.head, "specialize")
        assert found is not None  # may_be_missing is False
        return found

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._said = []
        with ExitStack() as stack:
            stack.enter_context(same_random_state(pl_module.device))
            stack.enter_context(muted(self.module))
            stack.enter_context(undisturbed(self.module))
            stack.enter_context(trainer.precision_plugin.train_step_context())
            stack.enter_context(torch.no_grad())
            arguments = (batch_idx,) if takes_batch_idx(self.module) else ()
            self.module.training_step(copied(batch), *arguments)

    @override
    def targets(self, trainer: Trainer, pl_module: LightningModule, calls: list[Call]) -> list[Tensor]:
        if len(calls) != len(self._said):
            raise NASError(
                f"specialize: training_step called {self.head} {len(self._said)} times for the teacher and "
                f"{len(calls)} times for the network that trains, on the same batch, so they cannot be "
                "compared. Leave head out to compare what the networks themselves return."
            )
        return self._said


def _with(network: nn.Module, supernet: Supernet, module: LightningModule) -> LightningModule:
    """A copy of the module with the small network in the place of the full one."""
    # What deepcopy finds in the memo it takes as the copy.
    memo = {id(entry): network for entry in (supernet.model, entry_of(supernet.model, module))}
    for name, child in supernet.model.named_modules():  # a head that the module holds by itself, too
        if name and supernet.anatomy.block_of(name) is None:
            memo[id(child)] = network.get_submodule(name)
    return uncompiled(copy.deepcopy(module, memo))


def _refuse(trainer: Trainer) -> None:
    faults = []
    if trainer.global_step > 0 or trainer.current_epoch > 0:
        faults.append(
            f"the Trainer has already trained ({trainer.global_step} steps), and its counters and its length "
            "belong to that run; give a fresh one"
        )
    if any(isinstance(callback, SupernetTraining) for callback in callbacks_of(trainer)):
        faults.append("the Trainer has a SupernetTraining or InstaTune callback; leave it out")
    if faults:
        raise UnsupportedError(f"specialize: {'; and '.join(faults)}.")


def _supernet_in(module: LightningModule) -> Supernet:
    """The supernet that a callback of the module's last run made of a network in it."""
    found = [callback.supernet for callback in _trained_by(module) if callback.supernet is not None]
    if len(found) == 1:
        return found[0]
    raise NASError(
        f"specialize: the last run of this {type(module).__name__} had {len(found)} callbacks with a "
        "supernet; say which one to take from: supernet=instatune.supernet."
    )


def _head_of(supernet: Supernet, module: LightningModule) -> str | None:
    """The head by which students were compared, if the module still has it."""
    heads = [callback.head for callback in _trained_by(module) if callback.supernet is supernet]
    names = dict(module.named_modules())
    return next((head for head in heads if head in names), None)


def _trained_by(module: LightningModule) -> list[SupernetTraining]:
    try:
        callbacks = callbacks_of(module.trainer)
    except RuntimeError:  # Lightning's, of a module that never had a Trainer
        return []
    return [callback for callback in callbacks if isinstance(callback, SupernetTraining)]


def _refuse_outside(supernet: Supernet, module: LightningModule) -> None:
    if supernet.released:
        raise NASError(
            "specialize: the supernet was released; specialise before supernet.release(), or make it again "
            "with supernet=nas.Supernet(network, space=...)."
        )
    if not any(child is supernet.model for child in module.modules()):
        raise NASError(
            f"specialize: the network of the supernet ({type(supernet.model).__name__}) is not in this "
            f"{type(module).__name__}; give the module that it was trained in."
        )


def _set_length(trainer: Trainer, epochs: float) -> None:
    if getattr(trainer, "fast_dev_run", False):
        return  # a length of its own
    passes = math.ceil(epochs)
    share, limit = epochs / passes, trainer.limit_train_batches
    trainer.fit_loop.max_epochs = passes
    if share < 1:
        is_share = isinstance(limit, float)
        trainer.limit_train_batches = share * limit if is_share else max(1, round(share * limit))
