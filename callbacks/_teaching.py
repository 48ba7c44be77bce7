"""A further loss on a network's output, beside the user's own: its gradient joins where both meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning_nas.callbacks._capture import Call, Capture, entry_of
from lightning_nas.callbacks._isolation import same_random_state
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_nas.distillation import OutputReader, read_output
from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet import family_of, supports

__all__ = [
    "OutputTeaching",
    "join",
    "join_at",
    "outputs_of",
    "refuse_other_classes",
    "refuse_whole",
    "returns_features",
]


def join(
    trainer: Trainer,
    network: nn.Module,
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Let a loss on the network's output add its gradient to that of the user's loss, at that output.

    For ``on_before_backward``: the graph of ``training_step`` carries both, in one backward pass.

    Args:
        trainer: scales the loss as it does the user's: accumulation, gradient scaler.
        network: tells which input is its mask of padding, which is left out of a loss token by token.
        calls: of it in this ``training_step``; their losses are averaged.
        targets: one a call.
        loss: of an output of the network and its target.

    Returns:
        The loss before scaling, detached.
    """

    def mean(outputs: Sequence[Tensor]) -> Tensor:
        losses = [
            loss(call.counted(network, output), call.counted(network, target))
            for call, output, target in zip(calls, outputs, targets, strict=True)
        ]
        return torch.stack(losses).mean()

    return join_at(trainer, [call.output for call in calls], mean)


def join_at(trainer: Trainer, tensors: Sequence[Tensor], loss: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Let a loss on tensors in the graph of the user's loss add its gradient there; see :func:`join`.

    Args:
        trainer: scales the loss as it does the user's.
        tensors: at which both gradients meet.
        loss: of those, detached.

    Returns:
        The loss before scaling, detached.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with trainer.precision_plugin.train_step_context(), torch.enable_grad():
        total = loss(leaves)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scaled = total / trainer.accumulate_grad_batches
    scaled = scaled if scaler is None else scaler.scale(scaled)
    for tensor, gradient in zip(tensors, torch.autograd.grad(scaled, leaves, allow_unused=True), strict=True):
        if gradient is not None:
            tensor.register_hook(lambda users, gradient=gradient: users + gradient)
    return total.detach()


def outputs_of(
    teacher: nn.Module,
    trainer: Trainer,
    pl_module: LightningModule,
    calls: Sequence[Call],
    read: OutputReader,
    where: str,
) -> list[Tensor]:
    """What a frozen teacher says to the input of each call, leaving the random state of the run alone.

    Raises:
        UnsupportedError: if it has other classes.
    """
    with same_random_state(pl_module.device), trainer.precision_plugin.train_step_context(), torch.no_grad():
        outputs = [read(teacher(*call.args, **call.kwargs)) for call in calls]
    for output, call in zip(outputs, calls, strict=True):
        if output.shape != call.output.shape:
            raise UnsupportedError(
                f"{where}: the teacher's output has shape {tuple(output.shape)} where the network's has "
                f"{tuple(call.output.shape)}. {_SAME_CLASSES}"
            )
    return outputs


def refuse_other_classes(network: nn.Module, teacher: nn.Module, where: str) -> None:
    """Refuse a teacher with other classes before the first step, where both tell how many they have.

    Raises:
        UnsupportedError: naming both numbers.
    """
    own, other = _classes(network), _classes(teacher)
    if own is not None and other is not None and own != other:
        raise UnsupportedError(
            f"{where}: the teacher ({type(teacher).__name__}) has {other} classes and the network has {own}. "
            f"{_SAME_CLASSES}"
        )


def refuse_whole(network: nn.Module, trainer: Trainer, pl_module: LightningModule, where: str) -> None:
    """Refuse to teach the LightningModule itself where the strategy calls it to run ``training_step``.

    Raises:
        UnsupportedError: with the remedy.
    """
    if network is pl_module and trainer.strategy.model is not pl_module:
        raise UnsupportedError(
            f"{where}: {type(trainer.strategy).__name__} runs training_step by a call of the "
            "LightningModule, which cannot be told from its own calls there. Put the parts of the network "
            "into one module, such as nn.Sequential(backbone, head), and name it: network='...'."
        )


def returns_features(network: nn.Module) -> bool:
    """Whether a network has no head, so that its output is to be compared as features."""
    if supports(network):
        return family_of(network).returns_features(network)
    return getattr(network, "num_classes", None) == 0


_SAME_CLASSES = "Give a teacher with the same classes in the same order."


def _classes(network: nn.Module) -> int | None:
    for name in ("num_classes", "num_labels"):
        if isinstance(count := getattr(network, name, None), int):
            return count
    return None


class OutputTeaching(Callback):
    """Watches one network while ``training_step`` runs, and lets subclasses add a loss on its output.

    Args:
        output: reads the logits from what the network returns; None: where it is plain.
    """

    def __init__(self, output: OutputReader | None) -> None:
        self.output = output
        self._undo = ExitStack()
        self._capture: Capture | None = None
        self._reached: bool | None = (
            None  # whether the user's gradient passes the output; None: not known yet
        )

    def teach(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, calls: list[Call]) -> None:
        """Add to the user's loss, right before its backward pass."""
        raise NotImplementedError

    @property
    def read(self) -> OutputReader:
        """Gives the tensor to distil."""
        return self.output or read_output

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        faults = []
        if not pl_module.automatic_optimization:
            faults.append(
                "manual optimization is not supported: the step is the user's own; use automatic optimization"
            )
        name = type(trainer.strategy).__name__
        if trainer.strategy.handles_gradient_accumulation or "FSDP" in name or "ModelParallel" in name:
            faults.append(f"{name} shards or scales what teachers need; use strategy='ddp'")
        if faults:
            raise UnsupportedError(f"{type(self).__name__}: {'; and '.join(faults)}.")

    def watch(
        self, network: nn.Module, pl_module: LightningModule, taps: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Begin to watch the network, and what modules inside it give, in ``on_fit_start``."""
        self._undo.close()  # a run that died without teardown may have left hooks behind
        self._capture = Capture(entry_of(network, pl_module), self.read, must_read=True, taps=taps)
        self._undo.callback(self._capture.remove)
        self._reached = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_lbfgs = any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers)
        if self._capture is not None and is_lbfgs:
            raise UnsupportedError(
                f"{type(self).__name__}: LBFGS runs training_step several times a step; use a first-order "
                "optimizer."
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._capture is not None:
            self._capture.calls = []

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._capture is None:
            return
        calls, self._capture.calls = self._capture.calls or [], None
        if self._reached is None:
            self._reached = False
            for call in calls:
                call.output.register_hook(self._note)
        if calls:
            self.teach(trainer, pl_module, loss, calls)

    def _note(self, gradient: Tensor) -> None:
        self._reached = True

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._reached is False:
            raise UnsupportedError(
                f"{type(self).__name__}: the loss of training_step does not depend on what was read from the "
                "network's output, so no teacher can reach it. Let training_step call the network itself, "
                "name another one with network='...', or pass output=, a function that reads the logits."
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._capture is not None:
            self._capture.calls = None  # a training_step that returned None had no backward pass to end it

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo.close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo.close()
