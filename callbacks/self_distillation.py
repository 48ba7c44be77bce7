"""A network that is also taught by what it was before: earlier snapshots of it, or its moving average."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from lightning_nas.callbacks._capture import Call
from lightning_nas.callbacks._networks import network_or_whole
from lightning_nas.callbacks._schedule import Phases
from lightning_nas.callbacks._teaching import OutputTeaching, join, outputs_of, refuse_whole, returns_features
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from typing_extensions import override

from lightning_nas.distillation import OutputReader, normalized_mse, soft_kl, vote

__all__ = ["SelfDistillation"]


class SelfDistillation(OutputTeaching):
    """Lets earlier versions of a network teach it, so that it comes to rest where the loss is flat.

    The loss of a step is the user's plus ``weight * T^2 * KL(teachers || network)``, at the network's output
    in his own ``training_step``, which stays as it is; before there is a teacher it is the user's alone. A
    teacher is a copy of the network, in eval mode and never trained. Needs no search and no supernet; beside
    ``SupernetTraining`` on the same network, the teachers are earlier versions of the largest.

    Cost: one forward pass without gradients and one copy of the weights for each teacher, and as much in each
    checkpoint.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[SelfDistillation(snapshots=3, weight=(0.0, 1.0))], logger=False)

    Args:
        network: dotted name of the sub-module whose output is compared; ``None``: the only one with
            parameters, or where there are several the LightningModule itself, as ``self(x)``.
        snapshots: how many earlier versions teach, the last ones; 0: none.
        every: epochs from one snapshot to the next, or optimizer steps, see ``unit``.
        unit: ``"epoch"`` or ``"step"``.
        ema: decay of a moving average that teaches too, in (0, 1), updated after each optimizer step;
            ``None``: none.
        weight: of the teachers, at least 0; a pair goes from the first to the second, in a line, from the
            end of ``warmup`` to the end of the run.
        temperature: of the softmax, above 0; a number or a pair.
        vote: ``"mean"`` of the teachers' probabilities, or their ``"majority"``.
        warmup: time without teaching: a fraction of the run below 1, rounded down, or a number of optimizer
            steps. Teachers are gathered meanwhile.
        output: reads the logits from what the network returns, where that is not plain.

    Attributes:
        teachers: the snapshots, the oldest first, and last the moving average.

    Raises:
        ValueError: for an argument out of range; at the start of ``fit``, for a pair or a fraction where the
            length of the run is unknown.
        NoMatchError: at the start of ``fit``, for an unknown name of a network.
        UnsupportedError: at the start of ``fit``, for a Trainer setting that cannot work; after the first
            backward pass, if the user's loss does not depend on the network's output.

    Reference: Zhu et al., SD-DARTS, 2023 (earlier supernets as voting teachers). Its vote weighed by the
    teachers' losses is left out: labels are the user's, inside his ``training_step``.
    """

    def __init__(
        self,
        network: str | None = None,
        snapshots: int = 3,
        every: int = 1,
        unit: Literal["epoch", "step"] = "epoch",
        ema: float | None = None,
        weight: float | tuple[float, float] = 1.0,
        temperature: float | tuple[float, float] = 1.0,
        vote: Literal["mean", "majority"] = "mean",
        warmup: int | float = 0,
        output: OutputReader | None = None,
    ) -> None:
        super().__init__(output)
        self.weight, self.temperature = _pair(weight), _pair(temperature)
        faults = []
        if snapshots < 0 or (snapshots == 0 and ema is None):
            faults.append(f"at least one teacher is needed, got snapshots={snapshots} and ema={ema}")
        if every < 1:
            faults.append(f"every must be at least 1, got {every}")
        if unit not in ("epoch", "step"):
            faults.append(f"unit must be 'epoch' or 'step', got {unit!r}")
        if ema is not None and not 0 < ema < 1:
            faults.append(f"ema must be in (0, 1), got {ema}")
        if min(self.weight) < 0:
            faults.append(f"weight must be at least 0, got {weight}")
        if min(self.temperature) <= 0:
            faults.append(f"temperature must be above 0, got {temperature}")
        if vote not in ("mean", "majority"):
            faults.append(f"vote must be 'mean' or 'majority', got {vote!r}")
        if faults:
            raise ValueError(f"SelfDistillation: {'; and '.join(faults)}.")
        self.network, self.snapshots, self.every, self.unit = network, snapshots, every, unit
        self.ema, self.vote, self.phases = ema, vote, Phases(warmup)
        self._snapshots = nn.ModuleList()  # the oldest first
        self._average: AveragedModel | None = None
        self._last_step, self._last_epoch = 0, -1  # that were looked at
        self._restored: dict[str, Any] | None = None

    @property
    def teachers(self) -> list[nn.Module]:
        """The snapshots, the oldest first, and last the moving average."""
        average = [] if self._average is None or not self._average.n_averaged else [self._average.module]
        return [*self._snapshots, *average]

    # --- binding to the run

    @property
    def state_key(self) -> str:
        """Tells two callbacks on different networks of one module apart in a checkpoint."""
        return self._generate_state_key(network=self.network)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0:
            self._snapshots, self._average = nn.ModuleList(), None
            self._last_step, self._last_epoch = 0, -1

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = self._find(pl_module)
        refuse_whole(network, trainer, pl_module, "SelfDistillation")
        self.watch(network, pl_module)
        if self.ema is not None and self._average is None:
            average = AveragedModel(network, avg_fn=get_ema_avg_fn(self.ema), use_buffers=True)
            self._average = average.requires_grad_(False).eval()
        if self._restored is not None:
            self._restore(network)
        for teacher in (self._snapshots, self._average):
            if teacher is not None:
                teacher.to(pl_module.device)

    def _find(self, pl_module: LightningModule) -> nn.Module:
        return network_or_whole(pl_module, self.network, "SelfDistillation")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.phases.resolve(trainer.estimated_stepping_batches, "SelfDistillation")
        changes = self.weight[0] != self.weight[1] or self.temperature[0] != self.temperature[1]
        if changes and self.phases.total_steps == float("inf"):
            raise ValueError(
                "SelfDistillation: weight or temperature changes over the run, but its length is unknown (no "
                "max_epochs or max_steps, or data without a length); give a single number."
            )
        every = self.unit if self.every == 1 else f"{self.every} {self.unit}s"
        kinds = [f"the last {self.snapshots} snapshots, one every {every}"] if self.snapshots else []
        kinds += [f"a moving average of decay {self.ema:g}"] if self.ema else []
        rank_zero_info(f"SelfDistillation: taught by {' and '.join(kinds)}; vote: {self.vote}.")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "snapshots": [snapshot.state_dict() for snapshot in self._snapshots],
            "average": None if self._average is None else self._average.state_dict(),
            "last_step": self._last_step,
            "last_epoch": self._last_epoch,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict  # the network may not exist yet
        self._last_step, self._last_epoch = state_dict["last_step"], state_dict["last_epoch"]

    def _restore(self, network: nn.Module) -> None:
        assert self._restored is not None  # asked before
        state, self._restored = self._restored, None
        self._snapshots = nn.ModuleList()
        for values in state["snapshots"][-self.snapshots :] if self.snapshots else ():
            snapshot = _frozen(network)
            snapshot.load_state_dict(values)
            self._snapshots.append(snapshot)
        if self._average is not None and state["average"] is not None:
            self._average.load_state_dict(state["average"])

    # --- teaching

    @override
    def teach(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, calls: list[Call]) -> None:
        step = trainer.global_step
        weight, temperature = (self._at(pair, step) for pair in (self.weight, self.temperature))
        teachers = self.teachers
        if not teachers or not weight or step < self.phases.warmup_steps:
            return
        said = [outputs_of(t, trainer, pl_module, calls, self.read, "SelfDistillation") for t in teachers]
        network = self._find(pl_module)
        if returns_features(network):
            targets = [torch.stack(outputs).mean(0) for outputs in zip(*said, strict=True)]
            extra = join(trainer, network, calls, targets, lambda o, t: weight * normalized_mse(o, t))
        else:
            targets = [vote(outputs, temperature, self.vote) for outputs in zip(*said, strict=True)]
            extra = join(trainer, network, calls, targets, lambda o, t: weight * soft_kl(o, t, temperature))
        if not trainer.barebones:
            pl_module.log("self_distillation_loss", extra)

    def _at(self, pair: tuple[float, float], step: int) -> float:
        first, last = pair
        return first + (last - first) * self.phases.progress(step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._last_step:
            return  # in an accumulation window, or the step was skipped
        self._last_step = trainer.global_step
        if self._average is not None:
            self._average.update_parameters(self._find(pl_module))
        if self.unit == "step" and trainer.global_step % self.every == 0:
            self._take_snapshot(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        # The first batch of an epoch, since a run resumed at the last of one passes neither end nor start.
        if trainer.current_epoch > self._last_epoch:
            self._last_epoch = trainer.current_epoch
            if self.unit == "epoch" and trainer.current_epoch and trainer.current_epoch % self.every == 0:
                self._take_snapshot(pl_module)

    def _take_snapshot(self, pl_module: LightningModule) -> None:
        if self.snapshots:
            kept = [*self._snapshots, _frozen(self._find(pl_module))]
            self._snapshots = nn.ModuleList(kept[-self.snapshots :])


def _frozen(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).requires_grad_(False).eval()


def _pair(value: float | tuple[float, float]) -> tuple[float, float]:
    first, last = (value, value) if isinstance(value, int | float) else value
    return float(first), float(last)
