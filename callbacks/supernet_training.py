"""Trains a network and its subnetworks in one run, around the user's own ``training_step``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from lightning_nas.callbacks._capture import Call, Capture, entry_of, tapped
from lightning_nas.callbacks._isolation import (
    RandomState,
    copied,
    eagerly,
    muted,
    same_random_state,
    undisturbed,
    unregularized,
)
from lightning_nas.callbacks._lightning import (
    accumulates,
    has_static_graph,
    run_validation,
    syncs_batch_norm,
    takes_batch_idx,
    training_batches,
)
from lightning_nas.callbacks._networks import find_network
from lightning_nas.callbacks._ordering import put_in_order, unsortable
from lightning_nas.callbacks._schedule import LearningRateFactor, Phases
from lightning_nas.callbacks._teaching import join, outputs_of, refuse_other_classes, returns_features
from lightning_nas.callbacks._watch import Watch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.data import extract_batch_size
from torch import Tensor, nn
from typing_extensions import override

from lightning_nas.distillation import OutputReader, StudentLoss, read_output, student_loss_named
from lightning_nas.errors import NASError, UnsupportedError
from lightning_nas.sampling import Largest, MultiArchitectural, Sampler, sampler_named
from lightning_nas.space import Architecture, SearchSpace
from lightning_nas.supernet import Supernet
from lightning_nas.supernet.statistics import tracks_statistics

__all__ = ["SupernetTraining"]

_MEASURED_STEPS = 8  # last optimizer steps of the warm-up whose gradients give the importance


class SupernetTraining(Callback):
    """Turns a training run into the training of a whole family of subnetworks that share its weights.

    The run has three phases. In ``warmup`` the user's module trains as it always did. Then heads and hidden
    units are put in the order of their importance, which changes no output. In ``sandwich`` each optimizer
    step also trains students, subnetworks of one forward and backward pass each, after the largest network's
    own: the gradient of a step is that of the user's loss plus the sum of the students' losses.

    The user's module stays as it is. It may use gradient accumulation, clipping, mixed precision, any
    scheduler, ``torch.compile`` and DDP. Cost: one forward and backward pass of each student a step, no extra
    memory beyond the largest network's step.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[SupernetTraining(warmup=0.3)], logger=False)

    Args:
        network: dotted name of the sub-module to make elastic; ``None``: the one supported network found.
        space: a search space, the name of a preset of the network's family, or ``None`` for its default.
        sampler: which students a step trains: a name or a sampler, such as ``nas.Sandwich(random=2)``. With
            ``nas.MultiArchitectural()`` several members share the user's own pass: dropout acts on all.
        order: ``"importance"`` (first-order Taylor, from the gradients of the last warm-up steps),
            ``"magnitude"``, or ``None`` to keep the order of the pretrained network.
        warmup: length of the first phase: a fraction of the run below 1, rounded down, or a number of
            optimizer steps. 0: order on the first batch.
        lr_factor: multiplies the scheduled learning rate in the sandwich phase.
        students_learn_from: ``"teacher"`` (the largest network), ``"task"`` (the user's loss), ``"both"``
            (half each), or a loss object such as ``nas.InstaTuneLoss(alpha=0.3)``.
        output: reads the logits from what the network returns, where that is not plain.
        head: dotted name of a module of yours that turns what the network returns into logits, so that
            students are compared by these, and not by the network's features. It needs a rule by which
            ``training_step`` runs for students, such as ``"both"``.
        temperature: of distillation by name, above 0.
        regularize: ``"largest"``: dropout and drop-path act on the largest network only; ``"all"``.
        seed: of the plan of students; the random state of the run is never used.
        exclude: shell patterns over layer names that stay whole.
        validate: which of ``"smallest"`` and ``"random"`` are validated beside the largest after each
            validation of the sandwich phase, logged as ``<metric>/<role>``.
        calibration_samples: how many training samples give a subnetwork its own batch-norm statistics before
            it is validated; a network without batch norm needs none.

    Attributes:
        supernet: the :class:`~lightning_nas.Supernet`, as soon as the network exists. After ``fit`` its
            layers stay elastic, with the largest network active, until ``supernet.release()``.
        importance: the scores that the order is made from, by group (``"layers.3.heads"``), in the order that
            the network had before.

    Raises:
        ValueError: for an argument out of range or an unknown name.
        UnsupportedError: at the start of ``fit``, for a network or Trainer setting that cannot work.

    Reference: Sridhar et al., InstaTune, ICCV 2023 workshops; Yu et al., BigNAS, ECCV 2020, section 3 (the
    sandwich step); the ordering is the Taylor criterion of Molchanov et al., ICLR 2017.
    """

    def __init__(
        self,
        network: str | None = None,
        space: SearchSpace | str | None = None,
        sampler: str | Sampler = "sandwich",
        order: Literal["importance", "magnitude"] | None = "importance",
        warmup: int | float = 0.3,
        lr_factor: float = 1.0,
        students_learn_from: str | StudentLoss = "both",
        output: OutputReader | None = None,
        head: str | None = None,
        temperature: float = 1.0,
        regularize: Literal["largest", "all"] = "largest",
        seed: int = 0,
        exclude: Sequence[str] = (),
        validate: Sequence[Literal["smallest", "random"]] = ("smallest", "random"),
        calibration_samples: int = 2000,
    ) -> None:
        where = type(self).__name__
        if order not in ("importance", "magnitude", None):
            raise ValueError(f"{where}: order must be 'importance', 'magnitude' or None, got {order!r}.")
        if regularize not in ("largest", "all"):
            raise ValueError(f"{where}: regularize must be 'largest' or 'all', got {regularize!r}.")
        if lr_factor <= 0:
            raise ValueError(f"{where}: lr_factor must be above 0, got {lr_factor}.")
        if calibration_samples < 1:
            raise ValueError(f"{where}: calibration_samples must be at least 1, got {calibration_samples}.")
        if unknown := set(validate) - {"smallest", "random"}:
            raise ValueError(f"{where}: validate may name 'smallest' and 'random', got {sorted(unknown)}.")
        self.network, self.space, self.order, self.seed = network, space, order, seed
        self.sampler = sampler_named(sampler)
        self.student_loss = student_loss_named(students_learn_from, temperature)
        self.phases = Phases(warmup)
        self.lr_factor, self.output, self.regularize = lr_factor, output, regularize
        self.head = head
        rule = self.student_loss
        if head is not None and (
            not rule.needs_task
            or bool(getattr(rule, "taps", ()))
            or getattr(rule, "strong_teacher", None) is not None
        ):
            raise ValueError(
                f"{where}: head={head!r} needs students that run training_step, without a frozen teacher and "
                f"without taps; students_learn_from={students_learn_from!r} is another rule. Use 'both'."
            )
        self.exclude, self.validate = tuple(exclude), tuple(validate)
        self.calibration_samples = calibration_samples
        self.supernet: Supernet | None = None
        self.ordered = False
        self.sandwich_steps = 0
        self.importance: dict[str, Tensor] = {}  # group of heads or units -> the scores it is ordered by
        self.watch = Watch(where)
        self._undo = ExitStack()
        self._mixing = ExitStack()  # while several members share the user's pass
        self._members: tuple[Architecture, ...] = ()
        self._capture: Capture | None = None  # of what students are compared by
        self._inputs: Capture | None = None  # of the network itself, for the first batch; often the same
        self._calls: list[Call] = []
        self._strong: list[Tensor | None] = []  # what the frozen teacher says to each of them
        self._step_arguments: tuple[Any, ...] = ()
        self._random_state: RandomState | None = None
        self._is_checked = False
        self._validation_is_due = False
        self._warmup_was: int | None = None  # its length, once it is over
        self._moving: list[nn.Parameter] | None = (
            None  # frozen parameters that training_step moves; None: unknown
        )
        self._frozen: list[tuple[nn.Parameter, Tensor]] = []
        self._students_own: set[nn.Parameter] = set()  # on several processes: what only students use

    @property
    def trained(self) -> Counter[str]:
        """How many students had each option, as ``"choice=option"``."""
        return self.watch.trained

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """For each role the optimizer steps and mean training losses that were logged."""
        return self.watch.curves

    # --- binding to the run

    @property
    def state_key(self) -> str:
        """Tells two callbacks on different networks of one module apart in a checkpoint."""
        return self._generate_state_key(network=self.network)

    @property
    def trains_students(self) -> bool:
        """Whether the sampler draws any student at all."""
        return not isinstance(self.sampler, Largest)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._refuse(trainer, pl_module)
        if trainer.global_step == 0:
            self.ordered, self.sandwich_steps = False, 0
            self.importance, self.watch, self._warmup_was = {}, Watch(type(self).__name__), None
        elif self.sandwich_steps:
            self._warmup_was = self.phases.warmup_steps
        # A network that configure_model makes does not exist yet; on_fit_start comes after it.
        self._attach(pl_module, may_be_missing=True)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mixing.close()
        self._undo.close()  # a run that died without teardown may have left hooks behind
        self._attach(pl_module, may_be_missing=False)
        supernet = self._require()
        if isinstance(self.sampler, MultiArchitectural):
            supernet.refuse_mixture()
        entry, read = entry_of(supernet.model, pl_module), self.output or read_output
        where = f"{type(self).__name__}: students_learn_from"
        taps = tapped(supernet.model, getattr(self.student_loss, "taps", ()), where)
        compared = entry if self.head is None else find_network(pl_module, self.head, type(self).__name__)
        assert compared is not None  # may_be_missing is False
        self._capture = Capture(compared, read, must_read=self.student_loss.needs_teacher, taps=taps)
        self._undo.callback(self._capture.remove)
        self._inputs = self._capture
        if compared is not entry:
            self._inputs = Capture(entry, read, must_read=False)
            self._undo.callback(self._inputs.remove)
        self._calls, self._is_checked, self._validation_is_due = [], False, False
        self._moving, self._frozen, self._students_own = None, [], set()
        if (teacher := getattr(self.student_loss, "strong_teacher", None)) is not None:
            refuse_other_classes(supernet.model, teacher, type(self).__name__)
            teacher.to(pl_module.device, next(supernet.model.parameters()).dtype).eval()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.phases.resolve(trainer.estimated_stepping_batches, type(self).__name__)
        if self._warmup_was is not None:  # a longer run does not go back into a warm-up that is over
            self.phases.warmup_steps = min(self.phases.warmup_steps, self._warmup_was)
        orders = self.trains_students and self.order and not self.ordered
        if orders and (fault := unsortable(trainer, at_start=self.phases.warmup_steps == 0)):
            raise UnsupportedError(f"{type(self).__name__}: {fault}.")
        if self.lr_factor != 1.0:
            self._factor = LearningRateFactor(self.lr_factor, trainer.optimizers)
            self._undo.callback(self._factor.remove)
        rank_zero_info(self._opening_line())

    def _opening_line(self) -> str:
        supernet, name = self._require(), type(self).__name__
        if not self.trains_students:
            return f"{name}: trains the largest network only, of {supernet.space.size:,} architectures."
        learns = type(self.student_loss).__name__.lower()
        compared = ", compared by logits."
        if not self.student_loss.needs_teacher:
            compared = "."
        elif self._compares_features():
            compared = (
                ", compared by features (normalised squared distance). Where a head of yours makes logits of "
                "them, name it to compare these: head='...'."
            )
        rate = f" at {self.lr_factor:g} times the scheduled learning rate" if self.lr_factor != 1 else ""
        return (
            f"{name}: {supernet.space.size:,} architectures. {self.phases}{rate}; "
            f"order: {self.order or 'as stored'}; students learn from {learns}{compared}"
        )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._mixing.close()
        self._undo.close()
        if self.supernet is not None:
            self.supernet.release()
            self.supernet = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "ordered": self.ordered,
            "scores": {name: score.cpu() for name, score in self.importance.items()},
            "sandwich_steps": self.sandwich_steps,
            "warmup_steps": self.phases.warmup_steps if self.ordered or self.sandwich_steps else None,
            "watch": self.watch.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ordered, self.sandwich_steps = state_dict["ordered"], state_dict["sandwich_steps"]
        self.importance, self._warmup_was = dict(state_dict["scores"]), state_dict["warmup_steps"]
        self.watch.load_state_dict(state_dict["watch"])

    def _attach(self, pl_module: LightningModule, may_be_missing: bool) -> None:
        network = find_network(pl_module, self.network, type(self).__name__, may_be_missing)
        if network is None:
            return
        if self.supernet is not None and not self.supernet.released and self.supernet.model is network:
            self.supernet.activate(self.supernet.space.largest)
        else:
            self.supernet = Supernet(network, space=self.space, exclude=self.exclude)

    def _require(self) -> Supernet:
        if self.supernet is None:
            raise NASError(f"{type(self).__name__}: there is no supernet yet; it exists once fit has set up.")
        return self.supernet

    # --- refusals

    def _refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        faults = []
        if not pl_module.automatic_optimization:
            faults.append(
                "manual optimization is not supported: the step is the user's own; use automatic optimization"
            )
        if has_static_graph(trainer):
            faults.append(
                "DDP with static_graph=True is not supported: students add passes; leave static_graph out"
            )
        if trainer.strategy.handles_gradient_accumulation:
            faults.append(
                f"{type(trainer.strategy).__name__} accumulates gradients itself, which hides them from the "
                "students; use strategy='ddp'"
            )
        network = find_network(pl_module, self.network, type(self).__name__, may_be_missing=True)
        if (
            syncs_batch_norm(trainer)
            and network is not None
            and any(map(tracks_statistics, network.modules()))
        ):
            faults.append(
                "sync_batchnorm=True replaces the batch norms of the network when the run begins; leave it "
                "out: statistics of subnetworks come from all processes anyway"
            )
        if faults:
            raise UnsupportedError(f"{type(self).__name__}: {'; and '.join(faults)}.")

    # --- one optimizer step

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._validate_roles(trainer, pl_module)
        self._require().forget_statistics()
        is_sandwich = self._is_sandwich(trainer)
        runs_again = self.student_loss.needs_task and not isinstance(self.sampler, MultiArchitectural)
        if is_sandwich and (runs_again or (self.order and not self.ordered)):
            # The user's step may change its batch: students get what it was before.
            self._step_arguments = (copied(batch), *((batch_idx,) if takes_batch_idx(pl_module) else ()))
            if self._moving is None:
                self._frozen = [
                    (p, p.detach().clone()) for p in pl_module.parameters() if not p.requires_grad
                ]
        if is_sandwich and self.order and not self.ordered:
            self._random_state = RandomState.now(pl_module.device)
            self._put_in_order(trainer, pl_module)
        self._expect_calls(trainer, pl_module)
        if is_sandwich and isinstance(self.sampler, MultiArchitectural):
            self._mix(trainer, self.sampler, extract_batch_size(batch))

    def _mix(self, trainer: Trainer, sampler: MultiArchitectural, batch: int) -> None:
        """Let several members share the user's next ``training_step``, other ones on each process."""
        supernet = self._require()
        seed = int(np.random.SeedSequence([self.seed, trainer.global_rank]).generate_state(1)[0])
        self._members = sampler.mixture(supernet.space, seed, trainer.global_step, batch)
        self._mixing.enter_context(eagerly())
        self._mixing.enter_context(supernet.mixture(self._members))

    def _expect_calls(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make ready for the user's next ``training_step``."""
        assert self._capture is not None  # made in on_fit_start
        self._calls = []
        if self._is_sandwich(trainer) or not self._is_checked:
            self._random_state = RandomState.now(pl_module.device)
            self._capture.calls = self._calls
        if not self._is_checked and self._inputs is not None and self._inputs is not self._capture:
            self._inputs.calls = []

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        assert self._capture is not None  # made in on_fit_start
        self._capture.calls = None
        if self._frozen:  # once: which frozen parameters does training_step move itself (momentum encoders)?
            self._moving = [
                parameter for parameter, value in self._frozen if not torch.equal(parameter, value)
            ]
            self._frozen = []
        weight = getattr(self.student_loss, "largest_weight", 1.0)
        if self._is_sandwich(trainer) and loss.requires_grad:
            if weight != 1.0:
                loss.register_hook(lambda gradient: gradient * weight)
            self._ask_strong_teacher(trainer, pl_module)
        for parameter in self._students_own:  # DDP takes it for used once a student has used it
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._calls = [call.cut() for call in self._calls]
        if bool(getattr(self.student_loss, "taps", ())) and self._calls and not self._calls[0].taps:
            raise UnsupportedError(
                f"{type(self).__name__}: students_learn_from compares what modules inside the network give, "
                "but none of those named ran in training_step (or torch.compile hides that they did). Name "
                "modules that run, or compare outputs alone, such as students_learn_from='both'."
            )

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_checked:
            self._mixing.close()
            self._check_largest(trainer, pl_module)
        if self._is_sandwich(trainer):
            self._train_students(trainer, pl_module)
            self._expect_calls(trainer, pl_module)  # LBFGS evaluates training_step several times a step

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._is_sandwich(trainer):
            if self.lr_factor != 1.0:
                self._factor.apply(optimizer)
        elif self.order == "importance" and not self.ordered:
            end = self.phases.warmup_steps if self.trains_students else self.phases.total_steps
            if end - trainer.global_step <= _MEASURED_STEPS:
                self._measure_importance()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._capture is not None  # made in on_fit_start
        self._capture.calls = None  # a training_step that returned None had no backward pass to end it
        self._calls, self._strong, self._step_arguments, self._random_state = [], [], (), None
        if self._members:
            self._mixing.close()
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self.watch.mixture(self._require().space, self._members, loss)
            self._members = ()
        self.watch.largest(outputs.get("loss") if isinstance(outputs, Mapping) else outputs)
        if accumulates(trainer):
            return
        if self.trains_students and trainer.global_step > self.phases.warmup_steps:
            self.sandwich_steps += 1
        self.watch.step(trainer)

    def _is_sandwich(self, trainer: Trainer) -> bool:
        return self.trains_students and trainer.global_step >= self.phases.warmup_steps

    def _train_students(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One forward and backward pass of each student, into the gradients that are already there.

        The largest network's graph is gone by now: a student's graph never lives beside it, and memory stays
        that of one network.
        """
        supernet, rule = self._require(), self.student_loss
        if not self._calls and rule.needs_teacher:
            return
        members = self.sampler.students(
            supernet.space, self.seed, trainer.global_step, self.phases.progress(trainer.global_step)
        )
        if not members:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        unused = [p for p in pl_module.parameters() if p.requires_grad and p.grad is None]
        for architecture in members:
            with self._as_student(trainer, pl_module, architecture):
                loss = self._student_loss(trainer, pl_module)
                if loss is None:
                    continue
                scaled = loss / trainer.accumulate_grad_batches
                (scaled if scaler is None else scaler.scale(scaled)).backward()
            self.watch.student(supernet.space, architecture, loss.detach())
        if trainer.world_size > 1:
            self._students_own.update(parameter for parameter in unused if parameter.grad is not None)
            if not accumulates(trainer):
                self._agree_on_gradients(trainer, pl_module)
                for parameter in self._students_own:  # as in one process, what nobody used has no gradient
                    if parameter.grad is not None and not parameter.grad.any():
                        parameter.grad = None

    @contextmanager
    def _as_student(
        self, trainer: Trainer, pl_module: LightningModule, architecture: Architecture
    ) -> Iterator[None]:
        supernet = self._require()
        with ExitStack() as stack:
            stack.enter_context(same_random_state(pl_module.device))
            moving = [parameter for parameter, _ in self._frozen] if self._moving is None else self._moving
            stack.enter_context(undisturbed(pl_module, moving))
            stack.enter_context(muted(pl_module))
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # one compiled graph: the largest's
            stack.enter_context(supernet.using(architecture))
            if self.regularize == "largest":
                stack.enter_context(unregularized(supernet.model))
            yield

    def _student_loss(self, trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
        rule, task = self.student_loss, None
        with trainer.precision_plugin.train_step_context():
            if rule.needs_task:
                task, calls = self._run_task(pl_module)
                if task is None:
                    return None
            else:
                calls = [self._run_again(call) for call in self._calls]
            if not rule.needs_teacher:
                return task
            if len(calls) != len(self._calls):
                raise NASError(
                    f"{type(self).__name__}: training_step called the network {len(self._calls)} times for "
                    f"the largest network but {len(calls)} times for a student on the same batch; "
                    "students_learn_from='teacher' does not call training_step again."
                )
            network, features, losses = self._require().model, self._compares_features(), []
            for own, call, strong in zip(calls, self._calls, self._strong, strict=True):
                student, teacher = (call.counted(network, output) for output in (own.output, call.output))
                strong = strong if strong is None else call.counted(network, strong)
                given = {"task": task, "strong": strong, "features": features, **self._inside(own, call)}
                losses.append(rule(student, teacher, **given))
            return torch.stack(losses).mean()

    def _run_task(self, pl_module: LightningModule) -> tuple[Tensor | None, list[Call]]:
        """The user's ``training_step`` once more on the same batch, from the same random state."""
        assert self._random_state is not None  # set in on_train_batch_start
        assert self._capture is not None  # made in on_fit_start
        self._random_state.restore()
        batch, *batch_idx = self._step_arguments
        with self._capture.on() as calls:
            output = pl_module.training_step(copied(batch), *batch_idx)
        loss = output["loss"] if isinstance(output, Mapping) else output
        return (loss if isinstance(loss, Tensor) else None), calls

    def _inside(self, student: Call, teacher: Call) -> dict[str, Any]:
        """What a rule with taps is given besides; a block that the student drops has no part in it."""
        if not getattr(self.student_loss, "taps", ()):
            return {}
        supernet = self._require()
        kept, block_of = supernet.fit.kept(supernet.active), supernet.anatomy.block_of
        taps = {name: tap for name, tap in student.taps.items() if (b := block_of(name)) is None or b in kept}
        mask = teacher.mask(supernet.model)
        return {"student_taps": taps, "teacher_taps": teacher.taps, "mask": mask}

    def _run_again(self, call: Call) -> Call:
        """The active network on the inputs of a call."""
        assert self._capture is not None  # made in on_fit_start
        with self._capture.tapping() as taps:
            return Call(call.args, call.kwargs, self._run_network(call), taps)

    def _run_network(self, call: Call) -> Tensor:
        return (self.output or read_output)(self._require().model(*call.args, **call.kwargs))

    def _ask_strong_teacher(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the frozen teacher says, once for everyone; the largest learns from it if the rule says so."""
        teacher = getattr(self.student_loss, "strong_teacher", None)
        self._strong = [None] * len(self._calls)
        if teacher is None or not self._calls:
            return
        read, where = self.output or read_output, type(self).__name__
        strong = outputs_of(teacher, trainer, pl_module, self._calls, read, where)
        self._strong = [*strong]
        if (extra := getattr(self.student_loss, "largest_extra", None)) is not None:
            join(trainer, self._require().model, self._calls, strong, extra)

    def _agree_on_gradients(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The mean over processes: DDP's own reduction came before the students'."""
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):  # in one order on every process
            group = [gradient for gradient in gradients if gradient.dtype == dtype]
            flat = trainer.strategy.reduce(torch.cat([g.reshape(-1) for g in group]), reduce_op="mean")
            for gradient, part in zip(group, flat.split([g.numel() for g in group]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _check_largest(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say whether the largest network gives the user's outputs, bit for bit, on the first batch."""
        self._is_checked = True
        calls = self._calls
        if self._inputs is not None and self._inputs is not self._capture:
            calls, self._inputs.calls = self._inputs.calls or [], None
        if not calls:
            if self.student_loss.needs_teacher and self.trains_students:
                rank_zero_warn(
                    f"{type(self).__name__}: training_step did not run the network as network(...) with "
                    "gradients on the first batch, so there is nothing to compare students with, and they "
                    "are not trained. Call the network itself, or use students_learn_from='task'."
                )
            return
        supernet, call = self._require(), calls[0]
        if not supernet.fit.is_whole(supernet.space.largest):
            rank_zero_info(f"{type(self).__name__}: the largest network of the space is a part of yours.")
            return
        with ExitStack() as stack:
            state = stack.enter_context(same_random_state(pl_module.device))
            stack.enter_context(undisturbed(pl_module))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.no_grad())
            stack.enter_context(trainer.precision_plugin.train_step_context())
            elastic = self._run_network(call)
            state.restore()
            with supernet.paused():
                plain = self._run_network(call)
        if torch.equal(elastic, plain):
            rank_zero_info(
                f"{type(self).__name__}: the largest network equals yours bit for bit (first batch)."
            )
        else:
            rank_zero_warn(
                f"{type(self).__name__}: the largest network's outputs differ from your network's by up to "
                f"{(elastic - plain).abs().max().item():.3g} on the first batch. If your network is "
                "deterministic, please report it."
            )

    # --- order

    def _measure_importance(self) -> None:
        if all(parameter.grad is None for parameter in self._require().model.parameters()):
            return  # the user's step returned None
        for name, score in self._require().importance().items():
            if torch.isfinite(score).all():  # a step that the gradient scaler will skip says nothing
                self.importance[name] = score + self.importance.get(name, torch.zeros_like(score)).to(score)

    def _put_in_order(self, trainer: Trainer, pl_module: LightningModule, *, at_end: bool = False) -> None:
        supernet = self._require()
        if self.order == "magnitude":
            self.importance = supernet.magnitude()
        elif not self.importance:
            self._measure_on_batch(trainer, pl_module)
        if not self.importance:
            return  # the user's step returned None; the next batch will do
        put_in_order(supernet, self.importance, trainer, pl_module, at_end=at_end)
        self.ordered = True
        rank_zero_info(f"{type(self).__name__}: heads and units are in the order of {self.order}.")

    def _measure_on_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Importance from the first batch, where no warm-up step gave gradients."""
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        kept = [p.grad for p in parameters]
        pl_module.zero_grad(set_to_none=True)
        try:
            with self._as_student(trainer, pl_module, self._require().space.largest):
                with trainer.precision_plugin.train_step_context():
                    loss, _ = self._run_task(pl_module)
                if loss is not None:
                    loss.backward()
                    if trainer.world_size > 1:
                        self._agree_on_gradients(trainer, pl_module)
                    self._measure_importance()
        finally:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient

    # --- what the user sees

    def _compares_features(self) -> bool:
        return self.head is None and returns_features(self._require().model)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_is_due = not trainer.sanity_checking and self.sandwich_steps > 0

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validate_roles(trainer, pl_module)

    def _validate_roles(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate small members after the user's own validation, which was the largest network's."""
        if not self._validation_is_due:
            return
        self._validation_is_due = False
        space, largest = self._require().space, dict(trainer.callback_metrics)
        rng = np.random.default_rng([self.seed, trainer.global_step, 1])
        members = {"smallest": space.smallest, "random": space.sample(rng)}
        values: dict[str, float] = {}
        for role in self.validate:
            for name, value in self.evaluate(trainer, pl_module, members[role]).items():
                values[f"{name}/{role}"] = value
                if name in largest:
                    values[f"{name}/largest"] = float(largest[name])
        self.watch.validated(trainer, values)

    def evaluate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        architecture: Architecture,
        watch: Callback | None = None,
        share: float = 1.0,
    ) -> dict[str, float]:
        """What the user's own validation logs for one architecture, leaving no trace in the run.

        Args:
            trainer: the running Trainer.
            pl_module: the user's module.
            architecture: the subnetwork.
            watch: a callback that sees this validation; the run's own do not.
            share: of the validation batches, in (0, 1]; the first ones.

        Returns:
            The logged values by name.
        """
        with ExitStack() as stack:
            stack.enter_context(same_random_state(pl_module.device))
            stack.enter_context(undisturbed(pl_module))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self._require().using(architecture))
            self._recalibrate(trainer, pl_module)
            return run_validation(trainer, watch, share)

    def _recalibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the active subnetwork batch-norm statistics of its own, by the user's ``training_step``.

        Each process sees its share of the samples, and all agree on the mean of what they saw.
        """
        supernet, seen = self._require(), 0
        if not supernet.is_stale:
            return
        agree = None if trainer.world_size == 1 else partial(trainer.strategy.reduce, reduce_op="mean")
        with muted(pl_module), supernet.recalibrating(agree):
            for i, batch in enumerate(training_batches(trainer)):
                with trainer.precision_plugin.train_step_context():
                    pl_module.training_step(batch, *((i,) if takes_batch_idx(pl_module) else ()))
                seen += extract_batch_size(batch) * trainer.world_size
                if seen >= self.calibration_samples:
                    break

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validate_roles(trainer, pl_module)
        if self.trains_students:
            space = self._require().space
            self.watch.ended(trainer, space, self.sandwich_steps, self.phases.warmup_steps)
