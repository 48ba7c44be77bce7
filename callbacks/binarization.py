"""Makes a network binary while it is fine-tuned, around the user's own ``training_step``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning_nas.callbacks._binary_checks import refuse_bad_scales, refuse_unused, stale_copy, untrained
from lightning_nas.callbacks._binary_watch import BinaryWatch
from lightning_nas.callbacks._frozen_teacher import FrozenTeaching
from lightning_nas.callbacks._isolation import eagerly
from lightning_nas.callbacks._lightning import callbacks_of
from lightning_nas.callbacks._networks import network_or_whole
from lightning_nas.callbacks._stages import (
    Stage,
    apply_stage,
    estimators_in,
    has_schedule,
    stage_at,
    stages_named,
)
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn
from typing_extensions import override

from lightning_nas.binary import Activations, BinaryLayer, Weights, binarize, layers, plan, release
from lightning_nas.distillation import HiddenStates, OutputReader, Relations
from lightning_nas.errors import NASError, NoMatchError, UnsupportedError
from lightning_nas.estimators import BiPer, Estimator, estimator_named
from lightning_nas.supernet import Supernet

__all__ = ["Binarization"]

_WHERE = "Binarization"


class Binarization(FrozenTeaching):
    """Makes the layers of a network binary, and trains them in the user's own run.

    Layers are swapped in place before optimizers are built, so that these hold the scales too. Names of
    parameters stay: a checkpoint of the float network loads, by ``fit(ckpt_path=...)`` too. After ``fit`` the
    network stays binary; ``nas.binary.release(model)`` gives the plain one back. ``validate``, ``test`` and
    ``predict`` alone make it binary as well, in its final form or that of the checkpoint.

    The user's module stays as it is, with gradient accumulation, clipping, mixed precision, any scheduler,
    weight averaging, ``torch.compile``, DDP, and manual optimization. Beside ``SupernetTraining`` or
    ``InstaTune`` on the same network the family is binary, in whatever order the callbacks are given.

    Cost: measured with 1-bit weights, 1.3 steps of the plain ViT-Tiny and 1.04 of a MiniLM; with 1-bit inputs
    about 2.5 (``benchmarks/bench_binarization_step.py``). Distillation adds a forward pass without gradients,
    and a copy of the weights in memory and in each checkpoint.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[Binarization(estimator="reste")], logger=False)

    Args:
        estimator: the rule of the gradient: a registered name (``"ste"``, ``"identity"``, ``"bireal"``,
            ``"ede"``, ``"dsq"``, ``"reste"``, ``"biper"``) or an instance.
        weights: bits, 1, 2 (``"ternary"``) or 32, or a :class:`~lightning_nas.binary.Weights`.
        activations: bits of inputs, 1 or 32, or an :class:`~lightning_nas.binary.Activations`.
        network: dotted name of the sub-module to make binary; ``None``: the only one with parameters, or
            where there are several the LightningModule itself.
        include: shell patterns over names of layers, see :func:`lightning_nas.binarize`.
        exclude: patterns of layers that stay real.
        schedule: whether estimators that change with the progress of a run (ReSTE's power, EDE's steepness)
            do so; else they stay as they were made.
        stages: which codes are in force when: pairs of a fraction of the run and ``weights``, ``activations``
            (bits, or 32 for real) or ``biper`` (1: the sine, 2: the square wave). By name:
            ``"weights-first"``, ``"activations-first"`` and ``"biper"``, which change in the middle.
        schedule_steps: optimizer steps that schedule and stages are stretched over; ``None``: the run.
        distill_from: ``"float"``, a frozen copy of the network before it is binary, or another network with
            the same inputs and classes. It is in eval mode and never trained.
        distill_weight: of ``T^2 KL(teacher || network)``, which is added to the user's loss; at least 0. Of a
            network without a head, the normalised squared distance of features.
        temperature: of the softmax, above 0.
        distill_hidden: what is compared inside besides: a shell pattern of layers whose hidden states are
            drawn to the teacher's (mean square), or ``nas.HiddenStates(...)`` or ``nas.Relations(...)``
            (attention), whose ``weight`` counts and whose ``then`` does not.
        clamp: keeps latent weights of binary layers within ``[-clamp, clamp]`` after each step, as training
            with the clipped straight-through estimator needs; ``None``: leaves them. Weight decay is the
            optimizer's: it shrinks latent weights, which speeds up flips; leave them out of it to stop that.
        log_every: optimizer steps from one look at the binary layers to the next; 0: never looks. Logs
            ``binary/flip_rate/<layer>`` (share of codes changed since the last look),
            ``estimating_error``, ``gradient_stability`` and ``scale``, and warns once of each layer that is
            dead.
        output: reads the logits from what the network returns, where that is not plain.

    Attributes:
        model: the network, as soon as it is binary.
        layers: its binary layers by name.
        teacher: the network that is distilled from.
        progress: of the schedule, in [0, 1].

    Raises:
        ValueError: for an argument out of range or an unknown name; at the start of ``fit``, for weights or
            scales that are not finite, or a schedule where the length of the run is unknown.
        NoMatchError: at the start, for a network or pattern that matches nothing.
        UnsupportedError: at the start, for a layer that cannot be binary, a Trainer setting that cannot work
            or a teacher with other classes.

    Reference: Wu et al., ICCV 2023 (ReSTE and its indicators); Vargas et al., BiPer, CVPR 2024 (two stages);
    Liu et al., ReActNet, ECCV 2020 (activations first) and BiT, NeurIPS 2022 (distillation).
    """

    def __init__(
        self,
        estimator: str | Estimator = "reste",
        weights: int | Literal["ternary"] | Weights = 1,
        activations: int | Activations = 32,
        *,
        network: str | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        schedule: bool = True,
        stages: str | Sequence[Stage] | None = None,
        schedule_steps: int | None = None,
        distill_from: Literal["float"] | nn.Module | None = None,
        distill_weight: float = 1.0,
        temperature: float = 1.0,
        distill_hidden: str | HiddenStates | Relations | None = None,
        clamp: float | None = None,
        log_every: int = 50,
        output: OutputReader | None = None,
    ) -> None:
        super().__init__(distill_from, distill_weight, temperature, distill_hidden, output)
        self.estimator = estimator_named(estimator)
        self.weights, self.activations = Weights.of(weights), Activations.of(activations)
        faults = []
        if self.weights.bits == self.activations.bits == 32:
            faults.append("weights and activations of 32 bits leave nothing to be binary")
        if schedule_steps is not None and schedule_steps < 1:
            faults.append(f"schedule_steps must be at least 1, got {schedule_steps}")
        if clamp is not None and not clamp > 0:
            faults.append(f"clamp must be above 0, got {clamp}")
        if log_every < 0:
            faults.append(f"log_every must be at least 0, got {log_every}")
        if faults:
            raise ValueError(f"{_WHERE}: {'; and '.join(faults)}.")
        self.stages = stages_named(
            stages, self.weights.bits, self.activations.bits, isinstance(self.estimator, BiPer)
        )
        self.network, self.include, self.exclude = network, include, exclude
        self.schedule, self.schedule_steps, self.clamp = schedule, schedule_steps, clamp
        self.watcher = BinaryWatch(_WHERE, log_every)
        self.model: nn.Module | None = None
        self.progress = 0.0
        self._stage: int | None = None
        self._total: float = math.inf
        self._last_step = 0
        self._made_in_this_run = self._told_inputs = False
        self._eager = ExitStack()
        self._found: dict[
            str, BinaryLayer
        ] = {}  # found once: a walk through the network for each step is slow

    @property
    def layers(self) -> dict[str, BinaryLayer]:
        """The binary layers by their names in the network; none before there are any."""
        return {} if self.model is None else layers(self.model)

    @property
    def state_key(self) -> str:
        """Tells two callbacks on different networks of one module apart in a checkpoint."""
        return self._generate_state_key(network=self.network)

    # --- the transform

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo.close()
        if stage == "fit":
            self._refuse(trainer)
            if self.distill_from is not None:
                super().setup(trainer, pl_module, stage)
            self._last_step, self._made_in_this_run = trainer.global_step, False
            if trainer.global_step == 0:
                self.watcher = BinaryWatch(_WHERE, self.watcher.every)
        # A module that overrides configure_model makes its network there, whatever it has before.
        is_late = self.network is None and is_overridden("configure_model", pl_module)
        if is_late or not self._make_binary(trainer, pl_module, stage, may_be_missing=True):
            self._wait_for_configure_model(trainer, pl_module, stage)

    def _wait_for_configure_model(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the network binary right behind ``configure_model``, the last moment before the optimizers.

        A plain function in the instance: Lightning calls it even where the class has none of its own, but not
        one that ``functools.wraps`` has marked.
        """
        original = pl_module.configure_model

        def configure_model() -> None:
            original()
            # Weight averaging calls it in its setup, before the module's own setup may have made the network.
            if self._make_binary(trainer, pl_module, stage, may_be_missing=stage == "fit"):
                self._undo.close()

        pl_module.configure_model = configure_model  # type: ignore[method-assign]
        self._undo.callback(pl_module.__dict__.pop, "configure_model", None)

    def _make_binary(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, may_be_missing: bool
    ) -> bool:
        """Swap the layers, if the network is there; whether it is."""
        self._release_supernets(trainer)
        try:
            network = network_or_whole(pl_module, self.network, _WHERE)
            found = layers(network)
            chosen = None if found else plan(network, self.include, self.exclude)
        except (NoMatchError, UnsupportedError):
            if may_be_missing:
                return False
            raise
        if chosen is None:
            self._adopt(network, found, stage)
            return True
        if stage == "fit":
            self.make_teacher(network)
        binarize(
            network,
            self.estimator,
            include=self.include,
            exclude=self.exclude,
            weights=self.weights,
            activations=self.activations,
        )
        for layer in layers(network).values():  # what is frozen stays so
            for name, parameter in layer.named_parameters():
                if name not in ("weight", "bias") and not layer.weight.requires_grad:
                    parameter.requires_grad_(False)
        if stage == "fit" and (stale := stale_copy(callbacks_of(trainer), pl_module)):
            release(network)
            raise UnsupportedError(
                f"{_WHERE}: {stale} has copied the module before its network was made binary, and its copy "
                f"lacks the scales. Give {_WHERE} before {stale} in callbacks=[...], and make the network in "
                "__init__ or configure_model."
            )
        self.model, self._found, self._stage = network, layers(network), None
        self._made_in_this_run, self._told_inputs = stage == "fit", False
        self._apply(0.0 if stage == "fit" else 1.0)
        if stage == "fit":
            rank_zero_info(self._opening_line(str(chosen)))
        return True

    def _adopt(self, network: nn.Module, found: dict[str, BinaryLayer], stage: str) -> None:
        """Go on with layers that are binary already."""
        for what, asked in (("weights", self.weights.bits), ("activations", self.activations.bits)):
            bits = {getattr(layer, what).bits for layer in found.values()}
            if asked not in bits:
                raise UnsupportedError(
                    f"{_WHERE}: the network is binary already, with {what} of {min(bits)} bits where "
                    f"{asked} were asked for. Give {what}={min(bits)}, or nas.binary.release(network) first."
                )
        if self.model is not network:
            self.model, self._stage, self._told_inputs = network, None, True
            if stage == "fit":
                self.make_teacher(network)
            rank_zero_info(
                self._opening_line(f"{len(found)} layers are binary already and stay as they are.")
            )
        self._found = found

    def _release_supernets(self, trainer: Trainer) -> None:
        """Let callbacks that made the network elastic before it was binary do so again in on_fit_start."""
        for callback in callbacks_of(trainer):
            supernet = getattr(callback, "supernet", None)
            if isinstance(supernet, Supernet) and not layers(supernet.model):
                supernet.release()
                callback.supernet = None  # type: ignore[attr-defined]

    def _opening_line(self, what: str) -> str:
        parts = [f"{_WHERE}: {what} Weights of {_bits(self.weights.bits)}, inputs of "]
        parts.append(f"{_bits(self.activations.bits)}; gradients by {self.estimator!r}")
        if self.stages:
            parts.append(f"; stages {', '.join(f'from {start:g}: {codes}' for start, codes in self.stages)}")
        if self.teacher is not None:
            parts.append(f"; taught by {type(self.teacher).__name__}")
        return "".join([*parts, "."])

    # --- refusals

    def _refuse(self, trainer: Trainer) -> None:
        name, faults = type(trainer.strategy).__name__, []
        if trainer.strategy.handles_gradient_accumulation:
            faults.append(f"{name} accumulates gradients itself and may shard weights; use strategy='ddp'")
        elif "FSDP" in name or "ModelParallel" in name:
            faults.append(f"{name} shards weights, and scales are means over whole ones; use strategy='ddp'")
        if faults:
            raise UnsupportedError(f"{_WHERE}: {'; and '.join(faults)}.")

    # --- the run

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        is_float = self.state_key not in (checkpoint.get("callbacks") or {})
        fresh = [n for layer in self._found.values() for n, _ in layer.named_parameters(recurse=False)]
        if is_float and {*fresh} - {"weight", "bias"} and checkpoint.get("optimizer_states"):
            checkpoint["optimizer_states"] = []
            rank_zero_info(
                f"{_WHERE}: the checkpoint is of the float network; optimizers begin anew, since its own "
                "knew no scales."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = network_or_whole(pl_module, self.network, _WHERE)
        if self.model is None or not layers(network):
            plan(network, self.include, self.exclude)  # says what is wrong with the network, if it can
            raise NASError(
                f"{_WHERE}: {type(pl_module).__name__} made its network anew after it was made binary, in "
                "setup or configure_model. Make it there only once ('if self.network is None: ...'), or name "
                "the right one: network='...'."
            )
        self.model, self._found = network, layers(network)
        refuse_bad_scales(self._found)
        refuse_unused(trainer, self._found.values(), self.stages)
        self.watch_both(trainer, pl_module, network)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if missing := untrained(trainer.optimizers, self._found):
            rank_zero_warn(
                f"{_WHERE}: {len(missing)} parameters of binary layers are not trained, as {missing[0]}: "
                "frozen, or in no optimizer. Rounded weights that cannot adapt cost accuracy: let "
                "configure_optimizers take them, or leave their layers real with exclude=."
            )
        total = self.schedule_steps or trainer.estimated_stepping_batches
        self._total = total if total > 0 else math.inf  # Lightning says -1 for no limit
        if math.isinf(self._total) and (self.stages or self._scheduled()):
            raise ValueError(
                f"{_WHERE}: the schedule is stretched over the run, but its length is unknown (no max_epochs "
                "or max_steps, or data without a length); give schedule_steps, or schedule=False without "
                "stages."
            )
        self._apply(self._progress_at(trainer.global_step))

    def _scheduled(self) -> list[Estimator]:
        return [e for e in estimators_in(self._found.values()) if has_schedule(e)] if self.schedule else []

    def _progress_at(self, step: int) -> float:
        return 0.0 if math.isinf(self._total) else min(1.0, step / self._total)

    def _apply(self, progress: float) -> None:
        """Put what belongs to this progress in force."""
        assert self.model is not None  # made before
        self.progress = progress
        for estimator in self._scheduled():
            estimator.schedule(progress)
        if self.stages and (index := stage_at(self.stages, progress)) != self._stage:
            self._stage = index
            apply_stage(self.model, self.stages[index][1])

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        progress = self._progress_at(trainer.global_step)
        if progress != self.progress:
            self._apply(progress)
        self._be_eager()
        self.watcher.begin(trainer, self._found)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.watcher.gradients(trainer, self._found)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.watcher.end()
        self._eager.close()
        if not self._told_inputs:
            self._tell_inputs()
        if trainer.global_step == self._last_step:
            return  # in an accumulation window, or the step was skipped
        self._last_step = trainer.global_step
        if self.clamp is not None:
            with torch.no_grad():
                for layer in self._found.values():
                    layer.weight.clamp_(-self.clamp, self.clamp)
        self.watcher.look(trainer, self._found)

    def _be_eager(self) -> None:
        """Run a first batch without ``torch.compile``: layers learn their inputs from it, outside of a graph.

        Else the graph would be in pieces for good.
        """
        if any(
            layer.input_bits != 32 and layer.input_is_nonnegative is None for layer in self._found.values()
        ):
            self._eager.enter_context(eagerly())

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._be_eager()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._eager.close()

    def _tell_inputs(self) -> None:
        """Say once which inputs got codes of 0 and 1, as soon as all have been seen."""
        coded = {name: layer for name, layer in self._found.items() if layer.input_estimator is not None}
        if any(layer.input_is_nonnegative is None for layer in coded.values()):
            return
        self._told_inputs = True
        if names := [name for name, layer in coded.items() if layer.input_is_nonnegative]:
            rank_zero_info(
                f"{_WHERE}: inputs of {', '.join(names)} were never negative in the first batch, as behind "
                "ReLU or softmax, and have codes 0 and 1; all others -1 and +1."
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stages and stage_at(self.stages, self.progress) < len(self.stages) - 1:
            rank_zero_warn(
                f"{_WHERE}: the run ended at {self.progress:.0%} of the schedule, before its last stage: the "
                f"network now has codes ({self.stages[-1][1]}) that it was never trained with. Train longer, "
                "or give smaller fractions or schedule_steps."
            )
        self._apply(1.0)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.watcher.end()
        self._eager.close()
        super().on_exception(trainer, pl_module, exception)
        if self._made_in_this_run and self.model is not None:
            for callback in callbacks_of(trainer):
                if isinstance(supernet := getattr(callback, "supernet", None), Supernet):
                    supernet.release()
                    callback.supernet = None  # type: ignore[attr-defined]
            release(self.model)
            self.model, self._made_in_this_run = None, False

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._made_in_this_run = False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "progress": self.progress,
            "watch": self.watcher.state_dict(),
            "teacher": self.teacher_state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watcher.load_state_dict(state_dict["watch"])
        self.restore_teacher(state_dict["teacher"])
        if self.model is not None:
            self._apply(state_dict["progress"])


def _bits(bits: int) -> str:
    return {1: "1 bit", 2: "2 bits (ternary)"}.get(bits, "32 bits (real)")
