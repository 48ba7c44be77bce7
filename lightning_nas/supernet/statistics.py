"""Running statistics of batch norms: one set for each subnetwork, since no other's are right for it.

The largest network's stay in the model's own buffers, where training leaves them. Every other architecture
reads stand-ins, which are right only after a recalibration: reset, then averaged over some batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["BUFFERS", "Statistics", "Values", "fresh", "tracks_statistics"]

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

Values: TypeAlias = dict[str, Tensor]
"""Stand-ins for the buffers of one batch norm, by name."""


def tracks_statistics(module: nn.Module) -> bool:
    """Whether a module normalises by running statistics in evaluation."""
    return isinstance(module, _BatchNorm) and module._buffers.get("running_mean") is not None


def fresh(values: Mapping[str, Tensor]) -> Values:
    """Statistics as of a new layer: mean 0, variance 1, no batch seen."""
    return {
        name: torch.ones_like(value) if name == "running_var" else torch.zeros_like(value)
        for name, value in values.items()
    }


class Statistics:
    """Which architectures have statistics of their own, until training changes the weights they belong to."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Values]] = {}  # key of an architecture -> name of a norm -> values
        self._active: str | None = None  # None: the largest network, whose own buffers are right
        self._has_warned = False
        self.is_recalibrating = False

    @property
    def are_stale(self) -> bool:
        """Whether the active architecture reads statistics that are not its own."""
        return self._active is not None and self._active not in self._known

    @property
    def are_any_known(self) -> bool:
        """Whether there is anything to forget."""
        return bool(self._known)

    def use(self, key: str | None) -> dict[str, Values] | None:
        """Make an architecture the active one; returns its statistics if they are known."""
        self._active, self._has_warned = key, False
        return None if key is None else self._known.get(key)

    def of(self, key: str) -> dict[str, Values] | None:
        """The statistics of an architecture, if they are known."""
        return self._known.get(key)

    def learn(self, key: str, values: dict[str, Values]) -> None:
        """Keep an architecture's statistics."""
        self._known[key] = values

    def forget(self) -> None:
        """The weights change: no statistics are right any more, but for the largest network's own."""
        self._known.clear()

    def watch(self, norm: nn.Module) -> None:
        """Called whenever a batch norm reads its running mean."""
        if torch.compiler.is_compiling():
            return
        if norm.training:
            if not self.is_recalibrating:
                self.forget()
        elif self.are_stale and not self._has_warned:
            self._has_warned = True
            warnings.warn(stale("the active subnetwork"), stacklevel=2)


def stale(what: str) -> str:
    """The warning for a network that runs on another one's statistics."""
    return (
        f"Supernet: the batch-norm statistics of {what} are the largest network's, not its own, and its "
        "outputs may be far off. Call supernet.recalibrate(batches) while it is active."
    )
