"""What a cost is: an architecture in, a number with a unit out; and the form that counts many at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_nas.objectives import Cost
from lightning_nas.registry import Registry
from lightning_nas.space import Value
from lightning_nas.supernet import Supernet
from lightning_nas.supernet.anatomy import Axis, Sizes, axis_length
from lightning_nas.supernet.fitting import Fit

__all__ = ["Cost", "CountTable", "Term", "costs", "resolve"]


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
class _Table:
    """The sum of one block's terms that depend on the same choices, for all combinations of options."""

    block: int | None
    columns: tuple[int, ...]
    values: NDArray[np.int64]


class CountTable:
    """A sum of terms, looked up: one table for the choices that its terms mention together.

    Args:
        fit: the space and what it decides.
        terms: what is summed.
        rest: a constant beside them.
    """

    def __init__(self, fit: Fit, terms: Iterable[Term], rest: int = 0) -> None:
        self._fit = fit
        column = {name: j for j, name in enumerate(fit.space.names)}
        sums: dict[tuple[int | None, tuple[int, ...]], Any] = {(None, ()): rest}
        for term in terms:
            groups = {segment.group for axis in term.axes for segment in axis if segment.group is not None}
            groups |= {fit.of[group] for group in groups if group in fit.of}
            chosen = sorted({column[name] for group in groups if (name := fit.sources[group]) is not None})
            key = (term.block, tuple(chosen))
            sums[key] = sums.get(key, 0) + term.count(self._grid(chosen))
        self._tables = tuple(
            _Table(block, chosen, np.asarray(value, dtype=np.int64))
            for (block, chosen), value in sums.items()
        )
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

    def _grid(self, chosen: Sequence[int]) -> dict[str, Any]:
        """The sizes of all groups, as arrays over the options of the chosen choices."""
        names = self._fit.space.names

        def value(name: str) -> Any:
            j, values = names.index(name), np.array(self._fit.space[name].values)
            return (
                values.reshape([-1 if other == j else 1 for other in chosen]) if j in chosen else values[-1]
            )

        return self._fit.sizes_at(value)

    def __call__(self, architectures: Iterable[Mapping[str, Value]]) -> NDArray[np.int64]:
        """The sum for each architecture."""
        index = self._fit.space.indices(architectures)  # -1, the last option, for an inactive choice
        runs = np.ones((len(index), self._blocks), dtype=np.int64)
        for first, depth, rows in self._depths:
            runs[:, first : first + rows.shape[1]] = rows[index[:, depth]]
        total = np.zeros(len(index), dtype=np.int64)
        for table in self._tables:
            value = table.values[tuple(index[:, j] for j in table.columns)] if table.columns else table.values
            total += value if table.block is None else value * runs[:, table.block]
        return total
