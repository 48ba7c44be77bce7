"""What a cost is: an architecture in, a number with a unit out; and the form that counts many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_nas.objectives import Cost
from lightning_nas.registry import Registry
from lightning_nas.space import Architecture, Value
from lightning_nas.supernet import Supernet
from lightning_nas.supernet.anatomy import Axis, Sizes, axis_length
from lightning_nas.supernet.fitting import Fit

__all__ = [
    "Cost",
    "CountTable",
    "Once",
    "Table",
    "Tables",
    "Term",
    "columns_of",
    "costs",
    "resolve",
    "sizes_over",
]


T = TypeVar("T")

costs: Registry[Any] = Registry("cost")
"""Names of costs -> ``make(supernet, example_inputs)``.

A user adds his own with a decorator, and then names it wherever a cost can be named::

    @costs.register("energy")
    def energy(supernet, example_inputs): return EnergyTable(supernet, "phone.csv")
"""


def resolve(cost: str | Cost, supernet: Supernet, example_inputs: Any) -> Cost:
    """The cost that a name stands for, for this supernet; a cost itself is returned as it is.

    Raises:
        ValueError: for an unknown name; lists the known ones.
        TypeError: for something that is neither.
    """
    if isinstance(cost, str):
        made: Cost = costs[cost](supernet, example_inputs)
        return made
    if isinstance(cost, Cost):
        return cost
    raise TypeError(f"A cost must be a name or a callable with .name and .unit, got {cost!r}.")


class Once(Generic[T]):
    """Works out each network once: architectures that are the same network share one answer.

    Args:
        supernet: of the architectures.
        work_out: the answer for an architecture in canonical form.
    """

    def __init__(self, supernet: Supernet, work_out: Callable[[Architecture], T]) -> None:
        self._supernet, self._work_out = supernet, work_out
        self._known: dict[str, T] = {}

    def __call__(self, architecture: Mapping[str, Value]) -> T:
        """The answer for one architecture."""
        canonical = self._supernet.space.canonical(architecture)
        if canonical.key not in self._known:
            self._known[canonical.key] = self._work_out(canonical)
        return self._known[canonical.key]


@dataclass(frozen=True)
class Term:
    """A product that an architecture costs: ``factor`` for each entry of its axes, while its block runs.

    Args:
        block: index of the block; None: always.
        factor: for example the number of tokens.
        axes: the dimensions of the product.
    """

    block: int | None
    factor: int
    axes: Sequence[Axis]

    def count(self, sizes: Sizes) -> Any:  # int or array, as the sizes are
        """The product at these sizes."""
        product = self.factor
        for axis in self.axes:
            product = product * axis_length(axis, sizes)
        return product


@dataclass(frozen=True)
class Table:
    """A value for every combination of options of some choices, while a block runs.

    Args:
        block: index of the block; None: always.
        columns: positions of the choices in the space.
        values: one axis a choice.
    """

    block: int | None
    columns: tuple[int, ...]
    values: NDArray[Any]  # integers or floats


class Tables:
    """Values looked up for many architectures at once.

    Args:
        fit: the space and what it decides.
        tables: of values of one kind, at least one.
    """

    def __init__(self, fit: Fit, tables: Iterable[Table]) -> None:
        self._fit, self._tables = fit, tuple(tables)
        column = {name: j for j, name in enumerate(fit.space.names)}
        self._depths: list[tuple[int, int, NDArray[np.int64]]] = []  # first block, column, (options, blocks)
        first = 0
        for stage in fit.stages:
            if stage.choice in fit.space:
                values = fit.space[stage.choice].values
                runs = np.zeros((len(values), len(stage.blocks)), dtype=np.int64)
                for row, value in enumerate(values):
                    runs[row, list(fit.kept_of(stage, {stage.choice: value}))] = 1
                self._depths.append((first, column[stage.choice], runs))
            first += len(stage.blocks)
        self._blocks = first

    def look_up(
        self, architectures: Iterable[Mapping[str, Value]]
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Of each table the values, one an architecture or one for all, and whether its block runs (0, 1)."""
        index = self._fit.space.indices(architectures)  # -1, the last option, for an inactive choice
        runs = np.ones((len(index), self._blocks + 1), dtype=np.int64)  # the last column: always
        for first, depth, rows in self._depths:
            runs[:, first : first + rows.shape[1]] = rows[index[:, depth]]
        for table in self._tables:
            values = (
                table.values[tuple(index[:, j] for j in table.columns)] if table.columns else table.values
            )
            yield values, runs[:, -1 if table.block is None else table.block]

    def __call__(self, architectures: Iterable[Mapping[str, Value]]) -> NDArray[Any]:
        """The sum over the tables, for each architecture."""
        return reduce(np.add, (values * runs for values, runs in self.look_up(architectures)))


class CountTable(Tables):
    """A sum of terms, looked up: one table for the choices that its terms mention together.

    Args:
        fit: the space and what it decides.
        terms: what is summed.
        rest: a constant beside them.
    """

    def __init__(self, fit: Fit, terms: Iterable[Term], rest: int = 0) -> None:
        sums: dict[tuple[int | None, tuple[int, ...]], Any] = {(None, ()): rest}
        for term in terms:
            chosen = columns_of(fit, (segment.group for axis in term.axes for segment in axis))
            key = (term.block, chosen)
            sums[key] = sums.get(key, 0) + term.count(sizes_over(fit, chosen))
        tables = (
            Table(block, chosen, np.asarray(value, dtype=np.int64)) for (block, chosen), value in sums.items()
        )
        super().__init__(fit, tables)


def columns_of(fit: Fit, groups: Iterable[str | None]) -> tuple[int, ...]:
    """The positions of the choices that decide the sizes of these groups."""
    known = {group for group in groups if group is not None}
    known |= {fit.of[group] for group in known if group in fit.of}
    names = {fit.sources[group] for group in known}
    return tuple(j for j, name in enumerate(fit.space.names) if name in names)


def sizes_over(fit: Fit, columns: Sequence[int]) -> dict[str, Any]:
    """The sizes of all groups, as arrays over the options of some choices: one axis a choice."""
    names = fit.space.names

    def value(name: str) -> Any:
        j, values = names.index(name), np.array(fit.space[name].values)
        if j not in columns:
            return values[-1]
        return values.reshape([-1 if other == j else 1 for other in columns])

    return fit.sizes_at(value)
