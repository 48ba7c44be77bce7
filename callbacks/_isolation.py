"""Running the user's code once more without leaving a trace: random state, logging, metrics, buffers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import LightningModule
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["RandomState", "copied", "eagerly", "muted", "same_random_state", "undisturbed", "unregularized"]


@dataclass(frozen=True)
class RandomState:
    """The state of the generators of torch (CPU and one device), numpy and Python at one moment."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None
    numpy: Any  # numpy's own state tuple
    python: Any  # Python's own state tuple

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The state at this moment."""
        accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, accelerator, np.random.get_state(), random.getstate())  # noqa: NPY002

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)


@contextmanager
def same_random_state(device: torch.device) -> Iterator[RandomState]:
    """Afterwards the random generators are where they were before."""
    state = RandomState.now(device)
    try:
        yield state
    finally:
        state.restore()


_asking: list[object] = []  # those inside of eagerly()
_stance = ExitStack()


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled networks run as they are written meanwhile.

    Callbacks that ask for it do not end in the reverse order of their beginning, so it ends with the last.
    """
    if not _asking:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    me = object()
    _asking.append(me)
    try:
        yield
    finally:
        _asking.remove(me)
        if not _asking:
            _stance.close()


@contextmanager
def muted(module: LightningModule) -> Iterator[None]:
    """``self.log``, ``self.log_dict`` and the loggers do nothing meanwhile."""

    def ignore(*args: Any, **kwargs: Any) -> None:
        return None

    trainer = module.trainer
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    module.log = ignore  # type: ignore[method-assign]  # found before the method of the class
    module.log_dict = ignore  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]
        trainer.loggers = loggers


@contextmanager
def undisturbed(module: LightningModule, moving: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Afterwards metrics, buffers and the module's own plain attributes are as they were.

    Kept: the state of every torchmetrics metric, the values of all buffers (batch-norm statistics, queues),
    and the attributes of the LightningModule itself: rebound ones, and lists, dicts, sets and deques that
    were filled in place. ``moving`` names parameters whose values are kept besides.
    """
    undo = [_keep_attributes(module), *(_keep_value(parameter) for parameter in moving)]
    for child in module.modules():
        if isinstance(child, Metric):
            undo.append(_keep_metric(child))
        elif child._buffers:
            undo.append(_keep_buffers(child))
    try:
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _keep_value(parameter: nn.Parameter) -> Callable[[], None]:
    tensor, value = parameter.data, parameter.detach().clone()

    def restore() -> None:
        parameter.data = tensor
        tensor.copy_(value)

    return restore


def _keep_metric(metric: Metric) -> Callable[[], None]:
    kept = dict(vars(metric))
    for name in metric._defaults:  # states are changed in place, so their values are kept too
        value = kept[name]
        kept[name] = value.clone() if isinstance(value, Tensor) else list(value)

    def restore() -> None:
        vars(metric).clear()
        vars(metric).update(kept)

    return restore


def _keep_buffers(module: nn.Module) -> Callable[[], None]:
    kept = {name: (buffer, buffer.clone()) for name, buffer in module._buffers.items() if buffer is not None}

    def restore() -> None:
        with torch.no_grad():
            for name, (buffer, value) in kept.items():
                module._buffers[name] = buffer
                buffer.copy_(value)

    return restore


def _keep_attributes(module: LightningModule) -> Callable[[], None]:
    framework = vars(nn.Module()).keys()
    kept = {name: value for name, value in vars(module).items() if name not in framework}
    contents = {
        name: value.copy() for name, value in kept.items() if isinstance(value, list | dict | set | deque)
    }

    def restore() -> None:
        attributes = vars(module)
        for name in [name for name in attributes if name not in kept and name not in framework]:
            del attributes[name]
        attributes.update(kept)
        for name, content in contents.items():
            container = kept[name]
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(content)

    return restore


@contextmanager
def unregularized(network: nn.Module) -> Iterator[None]:
    """Dropout and drop-path of the network do nothing meanwhile; its mode stays that of training.

    Reference: Yu et al., BigNAS, ECCV 2020, section 3.2: only the largest network is regularised.
    """
    kept: list[tuple[nn.Module, str, float]] = []
    for module in network.modules():
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        for name in ("p",) if is_dropout else ("drop_prob", "prob"):
            rate = getattr(module, name, None)
            if isinstance(rate, float) and rate > 0:
                kept.append((module, name, rate))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in kept:
            setattr(module, name, rate)


def copied(batch: Any) -> Any:
    """The same nest of containers, new ones, with copies of all tensors."""
    return apply_to_collection(batch, Tensor, Tensor.clone)
