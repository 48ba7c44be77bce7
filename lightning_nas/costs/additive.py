"""The cost of a network as a sum over its layers: which entries there are, and which an architecture has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_nas.costs.cost import Table, Tables, columns_of, sizes_over
from lightning_nas.space import Value
from lightning_nas.supernet import Supernet
from lightning_nas.supernet.anatomy import Anatomy, Axis

__all__ = ["Additive"]


@dataclass(frozen=True)
class _Layers:
    """Where the sizes of some groups decide together: layers of one block, or of none, that share them.

    Args:
        block: index of the block; None: outside of all.
        like: the name of the first block of the same kind, whose entries it has; empty: outside of all.
        groups: whose sizes decide.
        named: what they are called in that first block.
    """

    block: int | None
    like: str
    groups: tuple[str, ...]
    named: tuple[str, ...]


class Additive:
    """The entries of a table that predicts by sums: one for each option of each layer of each kind of block.

    A layer costs what the groups decide that set its size, so there is one entry for each combination of
    sizes of groups that meet in one layer (an MLP's units and the width), none for those that do not (its
    units and the heads). Blocks of one stage that are built alike share their entries, whose names then tell
    the first of them.

    Args:
        supernet: of the architectures.

    Attributes:
        entries: their names: the first is what all networks have.
    """

    def __init__(self, supernet: Supernet) -> None:
        self._fit = fit = supernet.fit
        ids: dict[str, int] = {"always": 0}
        tables = [Table(None, (), np.array(0))]
        for layers in _layers(supernet):
            columns = columns_of(fit, layers.groups)
            sizes = sizes_over(fit, columns)
            shape = tuple(len(fit.space.choices[j].values) for j in columns)
            grids = [np.broadcast_to(sizes[group], shape) for group in layers.groups]
            values = np.empty(shape, dtype=np.int64)
            for where in np.ndindex(shape):
                named = zip(layers.named, grids, strict=True)
                label = " ".join((layers.like, *(f"{name}={grid[where]}" for name, grid in named))).strip()
                values[where] = ids.setdefault(label or "always", len(ids))
            tables.append(Table(layers.block, columns, values))
        self.entries = tuple(ids)
        self._tables = Tables(fit, tables)
        self._ids = tables

    def counts(self, architectures: Iterable[Mapping[str, Value]]) -> NDArray[np.float64]:
        """How often each architecture has each entry, ``(n, entries)``."""
        architectures = list(architectures)
        counts = np.zeros((len(architectures), len(self.entries)))
        rows = np.arange(len(architectures))
        for ids, runs in self._tables.look_up(architectures):
            np.add.at(counts, (rows, np.broadcast_to(ids, rows.shape)), runs)
        return counts

    def sums(self, values: NDArray[np.float64]) -> Tables:
        """What adds up one value an entry, for many architectures at once."""
        return Tables(self._fit, (Table(t.block, t.columns, values[t.values]) for t in self._ids))


def _layers(supernet: Supernet) -> Iterable[_Layers]:
    """The layers of all blocks, and of what is outside, by the groups that decide about them together."""
    anatomy = supernet.anatomy
    first: dict[Any, tuple[str, tuple[str, ...]]] = {}  # by kind of block: the first one's name and groups
    with supernet.paused() as model:
        for block in (None, *range(len(anatomy.blocks))):
            axes = list(_axes_in(anatomy, block))
            groups = tuple(dict.fromkeys(s.group for _, axis in axes for s in axis if s.group is not None))
            name = "" if block is None else anatomy.blocks[block]
            kind = name if block is None else _kind(anatomy, block, axes, groups, model.get_submodule(name))
            like, named = first.setdefault(kind, (name, groups))
            together = {frozenset(s.group for s in axis if s.group is not None) for _, axis in axes}
            together.add(frozenset())  # a block in which nothing is elastic may still be left out
            largest = [one for one in together if not any(one < other for other in together)]
            for members in sorted(largest, key=lambda one: sorted(map(groups.index, one))):
                at = sorted(map(groups.index, members))
                yield _Layers(block, like, tuple(groups[i] for i in at), tuple(named[i] for i in at))


def _axes_in(anatomy: Anatomy, block: int | None) -> Iterable[tuple[str, Axis]]:
    """Of each tensor and product of a block all dimensions in a row, with its name inside the block."""
    prefix = 0 if block is None else len(anatomy.blocks[block])
    for part in anatomy.parts:
        if anatomy.block_of(part.module) == block:
            for name, axes in part.axes.items():
                yield f"{part.module[prefix:]}.{name}", tuple(s for axis in axes for s in axis)
    for operation in anatomy.operations:
        if anatomy.block_of(operation.module) == block:
            axis = tuple(s for axis in operation.axes for s in axis)
            yield f"{operation.module[prefix:]} {operation.per}", axis


def _kind(
    anatomy: Anatomy,
    block: int,
    axes: Sequence[tuple[str, Axis]],
    groups: Sequence[str],
    module: nn.Module,
) -> Any:
    """Equal for blocks that do the same work at equal sizes: of one stage, and built alike."""
    shape = tuple(
        (name, tuple((s.units, s.size, s.group and groups.index(s.group), s.centred) for s in axis))
        for name, axis in axes
    )
    return anatomy.stage_of(block).blocks[0], repr(module), shape
