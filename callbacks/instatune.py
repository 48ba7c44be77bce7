"""Fine-tunes a supernet and searches it for its Pareto front, in one run."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_nas.callbacks._capture import detached, entry_of
from lightning_nas.callbacks._isolation import same_random_state
from lightning_nas.callbacks._lightning import callbacks_of, can_validate
from lightning_nas.callbacks._racing import BatchRace
from lightning_nas.callbacks.supernet_training import SupernetTraining
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from typing_extensions import override

from lightning_nas.costs import costs as known_costs
from lightning_nas.costs import resolve
from lightning_nas.errors import NASError, UnsupportedError
from lightning_nas.objectives import Cost, Limit, Maximize, Minimize, Objective
from lightning_nas.racing import Racing, Rivals
from lightning_nas.registry import nearest
from lightning_nas.results import Candidate, SearchResult
from lightning_nas.space import Architecture
from lightning_nas.strategies import Strategy
from lightning_nas.study import resolved, search

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["InstaTune"]


class InstaTune(SupernetTraining):
    """Fine-tunes the user's network together with its subnetworks, then searches them for the Pareto front.

    Training is :class:`SupernetTraining`. When it ends, candidates are evaluated by the user's own
    ``validation_step`` and metrics on his validation data, with the weights that the run ends with. The
    study, a table, the result and a plot are written beside the checkpoints and logged through every logger.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[InstaTune(monitor="val_acc", mode="max", budget=50)], logger=False)

    Args:
        monitor: the value that the module logs in validation and the search is to improve.
        mode: ``"max"`` or ``"min"``.
        costs: the costs to minimise: names such as ``"macs"`` and ``"params"``, or cost objects.
        strategy: how candidates are chosen: a name or a strategy.
        budget: distinct candidates to evaluate, at least 1.
        storage: of the study: an Optuna storage or URL, or ``"memory"``; ``None``: a file beside the
            checkpoints.
        constraints: bounds on costs, as ``{"macs": ("<=", 2e8)}``.
        folder: where to write; ``None``: ``instatune`` beside the checkpoints, or in the trainer's root.
        racing: how sure to be before validation of a candidate is left early, because one that costs no more
            is better (``nas.Racing()``); ``None``: all are validated on everything. What is compared is what
            each batch adds to ``monitor``, in the order of the validation loader, which must be a random one
            (not by class); ``bounds`` are not used. It takes a dozen batches at least; more and smaller ones
            race better. The error rate holds for means over samples (accuracy, loss); for other values
            (F1, AUC), logged as metric objects, it is approximate, since early batches weigh otherwise.
        baseline: also search at random with the same budget, to see what the strategy is worth; it takes as
            long again.
        remeasure: how many times the front is validated again at the end, outside the budget, for the noise
            that the result states; 0 for none. Validation that gives the same numbers twice, as it mostly
            does, is repeated for two candidates and no more, so that the default costs next to nothing.
        **training: the arguments of :class:`SupernetTraining`. With ``sampler="largest"`` a plainly
            fine-tuned network is searched; ``seed`` is also the search's. A network that training did not
            put in order is put in order before the search.

    Attributes:
        result: the :class:`~lightning_nas.SearchResult`, after ``fit`` or :meth:`search`.

    Raises:
        ValueError: for an argument out of range or an unknown name; if validation does not log ``monitor``:
            in the Trainer's sanity check, before the first step, or without one at the first validation.
        UnsupportedError: at the start of ``fit``, for what cannot work, such as missing validation data.

    Reference: Sridhar et al., InstaTune, ICCV 2023 workshops.
    """

    def __init__(
        self,
        monitor: str = "val_acc",
        mode: Literal["max", "min"] = "max",
        costs: Sequence[str | Cost] = ("macs",),
        strategy: str | Strategy = "linas",
        budget: int = 100,
        storage: Any = None,  # whatever Optuna takes
        constraints: Mapping[Any, tuple[str, float]] | None = None,
        folder: str | Path | None = None,
        racing: Racing | None = None,
        baseline: bool = False,
        remeasure: int = 1,
        **training: Any,  # those of SupernetTraining, which checks them
    ) -> None:
        super().__init__(**training)
        if mode not in ("max", "min"):
            raise ValueError(f"InstaTune: mode must be 'max' or 'min', got {mode!r}.")
        if budget < 1:
            raise ValueError(
                f"InstaTune: budget must be at least 1 candidate, got {budget}; SupernetTraining trains only."
            )
        for cost in costs:
            if isinstance(cost, str) and cost not in known_costs:
                raise ValueError(f"InstaTune: unknown cost {cost!r}. {nearest(cost, known_costs)}")
        self.monitor, self.mode, self.costs, self.budget = monitor, mode, tuple(costs), budget
        self.strategy = resolved(strategy)
        self.storage, self.constraints, self.folder = storage, constraints, folder
        if not isinstance(racing, Racing | None):
            raise TypeError(f"InstaTune: racing must be a nas.Racing(...) or None, got {racing!r}.")
        if racing is not None and (measured := [q for q in constraints or () if _is_measured(q)]):
            raise ValueError(
                f"InstaTune: racing cannot tell who keeps the bound on {measured[0]!r}, which is measured: "
                "one that breaks it would stop others. Leave racing out, or bound costs only."
            )
        self.racing = racing
        if remeasure < 0:
            raise ValueError(f"InstaTune: remeasure is a number of times, 0 for none, got {remeasure}.")
        self.baseline, self.remeasure = baseline, remeasure
        Limit.all_of(constraints, "InstaTune")  # names a wrong bound now, not after training
        self.result: SearchResult | None = None
        self._search_after_validation = False
        self._before_sandwich: float | None = None  # what the full network reached in the warm-up

    # --- before the search

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.barebones:
            raise UnsupportedError(
                "InstaTune: Trainer(barebones=True) drops what validation logs, by which candidates are "
                "judged; leave barebones out."
            )
        if stage == "fit" and not can_validate(trainer):
            raise UnsupportedError(
                f"InstaTune: candidates are judged by {self.monitor!r} in validation, but there is none: "
                "give the module a validation_step, give fit(val_dataloaders=...), and leave "
                "limit_val_batches above 0."
            )
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._before_sandwich = None
            _put_last(trainer, self)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        logged = trainer.callback_metrics
        # A module that logs nothing at all while sanity checking may be one that leaves it out there.
        if self.monitor not in logged and (logged or not trainer.sanity_checking):
            remedy = (
                " If the module logs it outside Lightning's sanity check only, give "
                "Trainer(num_sanity_val_steps=0)."
            )
            raise ValueError(
                f"InstaTune: monitor={self.monitor!r} was not logged in validation. "
                f"{nearest(self.monitor, logged)}{remedy if trainer.sanity_checking else ''}"
            )
        if self.sandwich_steps == 0 and not trainer.sanity_checking:
            self._before_sandwich = float(logged[self.monitor])
        if self._search_after_validation:
            self._search_after_validation = False
            self._search(trainer, pl_module)

    # --- the search

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.order == "importance" and not self.ordered and not self.importance:
            rank_zero_info(
                "InstaTune: no gradients were measured, so heads and units keep their stored order."
            )
        elif self.order and not self.ordered and self.sandwich_steps == 0:
            self._put_in_order(trainer, pl_module, at_end=True)
        self._search(trainer, pl_module)

    def search(
        self,
        trainer: Trainer,
        module: LightningModule,
        datamodule: LightningDataModule | None = None,
        dataloaders: Any = None,  # whatever Trainer.validate takes
        *,
        strategy: str | Strategy | None = None,
        budget: int | None = None,
        folder: str | Path | None = None,
    ) -> SearchResult:
        """Search a module that was trained earlier, or search once more by other means.

        Args:
            trainer: runs the validation; needs no callback of ours.
            module: the user's module; its network becomes elastic if it is not yet.
            datamodule: with the validation data.
            dataloaders: the validation data, in place of a datamodule.
            strategy: in place of this callback's, for this search.
            budget: likewise.
            folder: likewise.

        Returns:
            The result, also kept as ``.result``.

        Raises:
            NoMatchError: if the module has no supported network.
            ValueError: if the module does not log ``monitor``; lists what it logs.
        """
        self._attach(module, may_be_missing=False)
        changes = {"strategy": resolved(strategy) if strategy else None, "budget": budget, "folder": folder}
        with ExitStack() as undo:
            for name, value in changes.items():
                if value is not None:
                    undo.callback(setattr, self, name, getattr(self, name))
                    setattr(self, name, value)
            before = callbacks_of(trainer)
            undo.callback(setattr, trainer, "callbacks", before)
            trainer.callbacks = [*(c for c in before if c is not self), self]  # type: ignore[attr-defined]
            undo.callback(setattr, self, "_search_after_validation", False)
            self._search_after_validation = True
            trainer.validate(module, dataloaders, datamodule=datamodule, verbose=False)
        assert self.result is not None  # on_validation_end set it, or validate raised
        return self.result

    def extract(self, candidate: Candidate | Architecture) -> nn.Module:
        """The plain network of a candidate: a copy that needs nothing of this package.

        Raises:
            NASError: before there is a supernet.
        """
        architecture = candidate.architecture if isinstance(candidate, Candidate) else candidate
        return self._require().extract(architecture)

    def _search(self, trainer: Trainer, pl_module: LightningModule) -> None:
        supernet, quick = self._require(), bool(getattr(trainer, "fast_dev_run", False))
        folder = self._folder(trainer)
        example = self._example(trainer, pl_module)
        objectives: list[Objective] = [(Maximize if self.mode == "max" else Minimize)(self.monitor)]
        with same_random_state(pl_module.device):
            counted = [resolve(cost, supernet, example) for cost in self.costs]
        objectives += map(Minimize, counted)
        if trainer.is_global_zero and not quick:
            folder.mkdir(parents=True, exist_ok=True)

        constraints = self._constraints(objectives, example)
        costs = {quantity.name for quantity in constraints if not isinstance(quantity, str)}
        taken = {*supernet.space.names, *(o.name for o in objectives[1:]), *costs}

        # A batch's mean is no sum of few known steps, as Racing.bounds would have it.
        racing = None if self.racing is None else replace(self.racing, bounds=None)
        rivals, raced_by = Rivals(racing, self.mode), counted if trainer.is_global_zero else []  # it decides

        def evaluate(architecture: Architecture, share: float = 1.0) -> dict[str, float]:
            if racing is None or share < 1:
                logged = self.evaluate(trainer, pl_module, architecture, share=share)
            else:
                race = BatchRace(self.monitor, rivals.start(cost(architecture) for cost in raced_by))
                logged = race.values(self.evaluate(trainer, pl_module, architecture, race))
            return {name: value for name, value in logged.items() if name not in taken}

        def run(evaluate: Callable[..., dict[str, float]]) -> SearchResult:
            return search(
                supernet.space,
                evaluate,
                objectives,
                strategy=self.strategy,
                budget=min(self.budget, 2) if quick else self.budget,
                storage="memory" if quick else (self.storage or folder / "study.log"),
                name=f"{type(self.strategy).__name__.lower()}-{_fingerprint(supernet.model)}",
                seed=self.seed,
                constraints=constraints,
                initial=(supernet.space.largest, supernet.space.smallest),
                baseline=self.baseline and not quick,
                remeasure=0 if quick else self.remeasure,
                progress=trainer.progress_bar_callback is not None,
            )

        limits = Limit.all_of(constraints, "InstaTune")
        empty = SearchResult(supernet.space, tuple(objectives), (), limits)
        self.result = _on_every_rank(trainer, run, evaluate, empty)
        if not quick:
            self._report(trainer, folder)

    def _example(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Any, ...] | dict[str, Any]:
        """One validation example as the network is called, from a validation pass of the largest network."""
        supernet = self._require()
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not found:
                found.append(apply_to_collection(detached((args, kwargs)), Tensor, _first))

        handle = entry_of(supernet.model, pl_module).register_forward_pre_hook(watch, with_kwargs=True)
        try:
            logged = self.evaluate(trainer, pl_module, supernet.space.largest)
        finally:
            handle.remove()
        if self.monitor not in logged:
            raise ValueError(
                f"InstaTune: monitor={self.monitor!r} was not logged in validation. "
                f"{nearest(self.monitor, logged)}"
            )
        if not found:
            raise NASError("InstaTune: validation did not call the network, so its costs cannot be counted.")
        args, kwargs = found[0]
        if not kwargs:
            return args
        signature = inspect.signature(supernet.model.forward)
        example = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                example.update(example.pop(name, {}))
        return example

    def _constraints(self, objectives: Sequence[Objective], example: Any) -> dict[Any, tuple[str, float]]:
        """The bounds, with each named cost as the object that counts it."""
        counted = {o.name: o.quantity for o in objectives if not isinstance(o.quantity, str)}
        bounds: dict[Any, tuple[str, float]] = {}
        for quantity, bound in (self.constraints or {}).items():
            if isinstance(quantity, str) and quantity in known_costs:
                quantity = counted.get(quantity) or resolve(quantity, self._require(), example)
            bounds[quantity] = bound
        return bounds

    # --- what the user gets

    def _folder(self, trainer: Trainer) -> Path:
        if self.folder is not None:
            return Path(self.folder)
        beside = [folder for c in trainer.checkpoint_callbacks if (folder := getattr(c, "dirpath", None))]
        name = "instatune" if self.network is None else f"instatune-{self.network}"
        return Path(beside[0] if beside else trainer.log_dir or trainer.default_root_dir) / name

    @rank_zero_only
    def _report(self, trainer: Trainer, folder: Path) -> None:
        result = self.result
        assert result is not None  # set before
        result.save(folder)
        table = result.to_dataframe()
        for logger in trainer.loggers:
            logger.log_metrics(
                {"search/hypervolume": result.hypervolume(), "search/candidates": len(result.candidates)}
            )
            if isinstance(logger, WandbLogger):
                logger.log_table(key="search/candidates_table", dataframe=table)
                logger.log_image(key="search/front", images=[str(folder / "front.png")])
                logger.experiment.config.update({"instatune": self._settings()}, allow_val_change=True)
            elif add_figure := getattr(
                getattr(logger, "experiment", None), "add_figure", None
            ):  # TensorBoard
                add_figure("search/front", result.plot())
        rank_zero_info(self._closing_lines(folder))

    def _settings(self) -> dict[str, Any]:
        space = self._require().space
        return {
            "monitor": self.monitor, "mode": self.mode,
            "costs": [str(getattr(cost, "name", cost)) for cost in self.costs],
            "strategy": repr(self.strategy), "budget": self.budget, "racing": repr(self.racing),
            "baseline": self.baseline, "remeasure": self.remeasure,
            "sampler": repr(self.sampler), "order": self.order,
            "warmup_steps": self.phases.warmup_steps, "lr_factor": self.lr_factor, "seed": self.seed,
            "students_learn_from": type(self.student_loss).__name__, "space_size": str(space.size),
        }  # fmt: skip

    def _closing_lines(self, folder: Path) -> str:
        result, cost = self.result, self.costs[0] if self.costs else None
        assert result is not None  # set before
        cost_name = str(getattr(cost, "name", cost))
        lines = [
            f"InstaTune: {len(result.candidates)} candidates evaluated, {len(result.front)} on the front; "
            f"written to {folder}.",
            result.summary().partition("\n\n")[2],
            "",
        ]
        if result.reference is not None and self._before_sandwich is not None and self.sandwich_steps:
            lines.append(
                f"The full network's {self.monitor}: {self._before_sandwich:.4g} after its own warm-up, "
                f"{result.reference.values[self.monitor]:.4g} with its family."
            )
        if cost is not None and result.front:
            middle = result.front[len(result.front) // 2].values[cost_name]
            lines += [
                "Next: take one, save it, load it anywhere:",
                f'    best = instatune.result.best("{self.monitor}", '
                f'where={{"{cost_name}": ("<=", {middle:.3g})}})',
                "    small = instatune.extract(best)           # a plain network",
                '    nas.save(small, "small/")                 # nas.load("small/")',
            ]
        return "\n".join(lines)


def _fingerprint(network: nn.Module) -> str:
    """Tells weights apart: a study is continued only by a search over the very network that it measured."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _is_measured(quantity: Any) -> bool:
    """Whether a bounded quantity is the name of a logged value, and no cost."""
    return isinstance(quantity, str) and quantity not in known_costs


def _first(tensor: Tensor) -> Tensor:
    return tensor[:1].clone() if tensor.ndim else tensor.clone()


def _put_last(trainer: Trainer, callback: Callback) -> None:
    """Let the search see the weights the run ends with: after every callback that copies averages in.

    A new list, since Lightning is walking over the old one. Checkpoint callbacks stay behind, where Lightning
    keeps them.
    """
    others = [c for c in callbacks_of(trainer) if c is not callback]
    checkpoints = [c for c in others if isinstance(c, Checkpoint)]
    ordered = [*(c for c in others if not isinstance(c, Checkpoint)), callback, *checkpoints]
    trainer.callbacks = ordered  # type: ignore[attr-defined]  # Lightning declares it nowhere


def _on_every_rank(
    trainer: Trainer,
    run: Callable[[Callable[..., dict[str, float]]], SearchResult],
    evaluate: Callable[..., dict[str, float]],
    empty: SearchResult,
) -> SearchResult:
    """Search on the first process; the others evaluate whatever it evaluates, and get what it found.

    ``empty`` is the result without candidates, in which each process holds its own cost objects.
    """
    if trainer.world_size == 1:
        return run(evaluate)
    broadcast = trainer.strategy.broadcast

    def evaluate_together(architecture: Architecture, share: float = 1.0) -> dict[str, float]:
        broadcast((architecture, share))
        return evaluate(architecture, share)

    if trainer.is_global_zero:
        result = None
        try:
            result = run(evaluate_together)
        finally:  # lets the others leave their loop, also when this process is about to fail
            broadcast(None)
            parts = [] if result is None else [result, result.baseline]
            broadcast([(part.candidates, part.failed) for part in parts if part is not None])
        return result
    while (asked := broadcast(None)) is not None:
        evaluate(*asked)
    found = broadcast(None)
    if not found:
        raise NASError("InstaTune: the search failed on the first process; its error tells why.")
    result, *baseline = (
        replace(
            empty,
            candidates=candidates,
            failed=failed,
            reference=next((c for c in candidates if c.architecture == empty.space.largest), None),
        )
        for candidates, failed in found
    )
    return replace(result, baseline=baseline[0] if baseline else None)
