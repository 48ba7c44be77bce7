"""Every place where the callbacks rely on something that Lightning does not document as public.

``tests/callbacks/test_lightning_internals.py`` fails when Lightning changes one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from copy import copy, deepcopy
from typing import Any, NoReturn

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar, WeightAveraging
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.compile import to_uncompiled
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_nas.errors import NASError, UnsupportedError

__all__ = [
    "accumulates",
    "callbacks_of",
    "can_validate",
    "end_validation",
    "finds_unused_parameters",
    "has_static_graph",
    "run_validation",
    "sum_so_far",
    "syncs_batch_norm",
    "takes_batch_idx",
    "training_batches",
    "uncompiled",
]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks; the attribute exists, but Lightning declares it nowhere."""
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def accumulates(trainer: Trainer) -> bool:
    """Whether the current micro-batch ends without an optimizer step."""
    return bool(trainer.fit_loop._should_accumulate())


def can_validate(trainer: Trainer) -> bool:
    """Whether ``fit`` has a ``validation_step`` and validation data to run it on."""
    return bool(trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()) and trainer.enable_validation


def has_static_graph(trainer: Trainer) -> bool:
    """Whether DDP was asked for a static graph."""
    return bool(getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph", False))


def finds_unused_parameters(trainer: Trainer) -> bool:
    """Whether every parameter may be without a gradient in some step: not so under DDP, unless asked for."""
    settings = getattr(trainer.strategy, "_ddp_kwargs", None)
    return settings is None or bool(settings.get("find_unused_parameters", False))


def takes_batch_idx(module: LightningModule) -> bool:
    """Whether ``training_step`` takes ``batch_idx`` besides the batch."""
    from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature

    return bool(is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2))


def training_batches(trainer: Trainer) -> Iterator[Any]:
    """Batches of the training data on the module's device, from an iteration that no other one notices.

    Raises:
        NASError: if there is no training data, or the user's code cannot give it outside ``fit``.
    """
    combined = _training_loaders(trainer)
    module, generators = trainer.lightning_module, []
    for loader in combined.flattened:
        batches = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generators.append(generator)
    states = [generator.get_state() for generator in generators]
    try:
        for batch, _, _ in iter(CombinedLoader(tree_map(_another, combined.iterables), combined._mode)):
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _training_loaders(trainer: Trainer) -> CombinedLoader:
    """Those of ``fit``, or outside of it those of the datamodule or module."""
    combined: CombinedLoader | None = trainer.fit_loop._combined_loader
    if combined is not None:
        return combined
    source = trainer.fit_loop._data_source
    if source.instance is None or not source.is_defined():
        raise NASError(
            "Batch-norm statistics of a subnetwork come from training data, and this Trainer has none: give "
            "it a datamodule with a train_dataloader."
        )
    try:
        loaders = source.dataloader()
    except Exception as error:  # the user's code, which may rely on what setup("fit") makes
        raise NASError(
            "Batch-norm statistics of a subnetwork come from training data, but train_dataloader() of "
            f"{type(source.instance).__name__} failed outside fit ({type(error).__name__}: {error}). Let its "
            "setup prepare the training data for stage='validate' too."
        ) from error
    return loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")


def syncs_batch_norm(trainer: Trainer) -> bool:
    """Whether Lightning replaces batch norms when the run begins (``sync_batchnorm=True``)."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def _another(loader: Any) -> Any:
    """A loader of the same data: iterating it leaves alone the workers that the first one keeps."""
    copied = copy(loader)
    if isinstance(copied, DataLoader):
        copied._iterator = None
    return copied


def uncompiled(module: LightningModule) -> LightningModule:
    """A module as it was before ``torch.compile``, in place; its compiled steps belong to what it copies."""
    return module if module._compiler_ctx is None else to_uncompiled(module)


def run_validation(trainer: Trainer, watch: Callback | None = None, share: float = 1.0) -> dict[str, float]:
    """One pass of the running Trainer's own validation loop over the user's ``validation_step`` and metrics.

    Callbacks (but for weight averaging, which lends its weights) and loggers see nothing of it, and the
    loop's progress, the logged values and the trainer's stage are put back. On several processes each value
    is the mean over them.

    Args:
        trainer: the Trainer.
        watch: a callback that does see it, and may :func:`end_validation`.
        share: of the batches of each loader, the first ones; at least one.

    Returns:
        What the module logged, by the names that ``monitor=`` would use.

    Raises:
        UnsupportedError: for a share of data whose length is unknown.
    """
    fitting = trainer.state.fn == TrainerFn.FITTING
    loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
    connector = trainer._logger_connector
    with ExitStack() as undo:
        # The bar stays in the list, since a thread of its own looks for it there.
        kept = [c for c in callbacks_of(trainer) if isinstance(c, WeightAveraging | RichProgressBar)]
        for bar in kept:
            if isinstance(bar, RichProgressBar) and bar.is_enabled:
                bar.disable()
                undo.callback(bar.enable)
        _restore(undo, trainer, "callbacks", kept if watch is None else [*kept, watch])
        _restore(undo, trainer, "loggers", [DummyLogger() for _ in trainer.loggers])
        _restore(undo, trainer.state, "stage", trainer.state.stage)
        if hasattr(trainer, "_last_val_time"):  # a Trainer that has never validated lacks it
            _restore(undo, trainer, "_last_val_time", trainer._last_val_time)
        for module in trainer.lightning_module.modules():  # a validation_step that raises leaves them in eval
            undo.callback(setattr, module, "training", module.training)
        _restore(undo, loop, "verbose", False)
        _restore(undo, loop, "batch_progress", deepcopy(loop.batch_progress))
        _restore(undo, loop, "_restart_stage", loop._restart_stage)
        _restore(undo, loop, "_restarting", False)
        _restore(undo, loop, "_results", type(loop._results)(training=False))
        for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics"):
            _restore(undo, connector, name, {})
        for name in ("_first_loop_iter", "_current_fx"):
            _restore(undo, connector, name, None)
        if fitting:
            trainer.validating = True
        if share < 1:
            _limit(undo, loop, share)
        loop.run()
        logged = dict(connector._callback_metrics)
    return _mean_over_ranks(trainer, {name: float(value) for name, value in logged.items()})


def _limit(undo: ExitStack, loop: Any, share: float) -> None:  # Any: the loop declares these nowhere
    """Let a validation loop take a share of its batches, until ``undo`` is closed."""
    loop.setup_data()
    if not all(math.isfinite(count) for count in loop._max_batches):
        raise UnsupportedError(
            "A share of the validation data was asked for, but its length is unknown: give the Trainer "
            "limit_val_batches=..., data with a length, or the search another strategy."
        )
    _restore(undo, loop, "_max_batches", [max(1, round(share * count)) for count in loop._max_batches])
    vars(loop)["setup_data"] = lambda: None  # in Trainer.validate it would count the batches anew
    undo.callback(vars(loop).pop, "setup_data")


def end_validation() -> NoReturn:
    """From a callback's ``on_validation_batch_end``: end the loop as if there were no more data."""
    raise StopIteration


def sum_so_far(trainer: Trainer, name: str, samples: float) -> tuple[float, float] | None:
    """What the running validation has summed up of a value that is a mean, and over how many samples.

    Args:
        trainer: the Trainer, in ``on_validation_batch_end``.
        name: of the value, logged in ``validation_step`` as a number or as a metric object.
        samples: how many this process has seen, for a metric object. Its value is computed on this process.

    Returns:
        The two; None where the value is not logged there, with several loaders, or not as a mean.
    """
    for logged in (trainer._results or {}).values():
        meta = logged.meta
        if name not in (meta.name, meta.forked_name(on_step=False)) or not meta.on_epoch:
            continue
        if meta.fx != "validation_step" or (logged.is_tensor and not meta.is_mean_reduction):
            return None
        if logged.is_tensor:
            return float(logged.value), float(logged.cumulated_batch_size)
        metric, syncs = logged.value, logged.value._to_sync
        metric._to_sync = False
        try:
            return samples * float(metric.compute()), samples
        finally:
            metric._to_sync, metric._computed = syncs, None
    return None


def _restore(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until ``undo`` is closed, then put the very object back that was there."""
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _mean_over_ranks(trainer: Trainer, logged: dict[str, float]) -> dict[str, float]:
    """The mean over processes of what all of them logged; what only some logged stays as it is here."""
    if trainer.world_size == 1:
        return logged
    names: list[str] = trainer.strategy.broadcast(sorted(logged))
    device = trainer.strategy.root_device
    rows = [[float(name in logged), logged.get(name, 0.0)] for name in names]
    table = torch.tensor(rows, dtype=torch.float64, device=device).reshape(len(names), 2)
    table = trainer.strategy.reduce(table, reduce_op="mean")
    shared = {name: value for name, (share, value) in zip(names, table.tolist(), strict=True) if share == 1.0}
    return {**logged, **shared}
