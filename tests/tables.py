"""Search problems whose every network is known: one measured table, three generated ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property

import numpy as np

from lightning_nas.objectives import Maximize, Minimize
from lightning_nas.results import hypervolume, non_dominated
from lightning_nas.space import Architecture, Choice, Depth, SearchSpace
from tests import macro_table


class Table:
    """Accuracy (larger is better) and cost of every network of a space.

    Args:
        space: at most some 10^5 points, conditions aside.
        accuracy: ``(n, choices)`` canonical positions to ``(n,)``.
        cost: in the same way.
        reference: the worst accuracy and cost of interest; None: the median and the highest one.

    Attributes:
        grids: accuracy and cost by positions, one axis a choice.
        accuracies: of each network once, beside ``costs``.
    """

    name, unit = "cost", "M"  # it is its own cost

    def __init__(
        self,
        space: SearchSpace,
        accuracy: Callable[[np.ndarray], np.ndarray],
        cost: Callable[[np.ndarray], np.ndarray],
        reference: tuple[float, float] | None = None,
    ) -> None:
        self.space, sizes = space, [len(choice.values) for choice in space]
        everything = np.indices(sizes).reshape(len(sizes), -1).T
        positions = space.canonical_positions(everything)
        flat = accuracy(positions), cost(positions)
        self.grids = [values.reshape(sizes) for values in flat]
        own = (positions == everything).all(axis=1)
        self.accuracies, self.costs = (values[own] for values in flat)
        worst = reference or (float(np.median(self.accuracies)), float(self.costs.max()))
        self.reference = dict(zip(("accuracy", "cost"), worst, strict=True))
        self.objectives = [Maximize("accuracy"), Minimize(self)]

    def many(self, architectures: Sequence[Architecture]) -> np.ndarray:
        return self.grids[1][self._at(architectures)]

    def __call__(self, architecture: Architecture) -> float:
        return float(self.many([architecture])[0])

    def evaluate(self, architecture: Architecture) -> dict[str, float]:
        return {"accuracy": float(self.grids[0][self._at([architecture])][0])}

    @cached_property
    def exact(self) -> float:
        """The hypervolume of the exact front."""
        losses = np.stack([-self.accuracies, self.costs], axis=1)
        accuracy, cost = self.reference.values()
        return hypervolume(losses[non_dominated(losses)], np.array([-accuracy, cost]))

    def top(self, share: float) -> tuple[float, int]:
        """The least accuracy of the best networks, and how many reach it."""
        least = np.sort(self.accuracies)[-max(1, int(share * len(self.accuracies)))]
        return float(least), int((self.accuracies >= least).sum())

    def _at(self, architectures: Sequence[Architecture]) -> tuple[np.ndarray, ...]:
        return tuple(self.space.canonical_positions(self.space.indices(architectures)).T)


def _sum(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What the options of a row add up to, from ``(choices, options)``."""
    return values[np.arange(positions.shape[1]), positions].sum(axis=1)


@cache
def macro() -> Table:
    """NAS-Bench-Macro: 6,561 architectures, trained."""

    def column(which: int) -> Callable[[np.ndarray], np.ndarray]:
        rows = macro_table.table()
        return lambda positions: np.array([float(rows["".join(map(str, p))][which]) for p in positions])

    return Table(macro_table.SPACE, column(0), lambda p: column(1)(p) / 1e6, reference=(80.0, 120.0))


@cache
def encoder(seed: int = 0) -> Table:
    """55,944 encoders: 3 to 6 blocks, each with heads and an MLP; blocks that do not run do not count.

    A block gains less from each further unit, heads and MLP of a block help each other, and a block far
    wider than the one before it is wasted in part.
    """
    rng = np.random.default_rng(seed)
    choices: list[Choice] = [Depth("depth", (3, 4, 5, 6))]
    for i in range(6):
        when = {"depth": tuple(range(i + 1, 7))} if i >= 3 else {}
        choices += [Choice(f"layers.{i}.heads", (2, 4), when), Choice(f"layers.{i}.mlp", (1, 2, 3), when)]
    worth, price = rng.uniform(0.5, 2.0, (2, 6)), rng.uniform(0.7, 1.3, (2, 6))

    def parts(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        runs = np.arange(6) < positions[:, :1] + 3
        return runs * (2 + 2 * positions[:, 1::2]), runs * (1 + positions[:, 2::2])

    def accuracy(positions: np.ndarray) -> np.ndarray:
        heads, mlp = parts(positions)
        alone = worth[0] * np.sqrt(heads) + worth[1] * np.sqrt(mlp)
        together = 0.1 * (heads * mlp).sum(1)
        wasted = 0.5 * np.maximum(0, np.diff(mlp, axis=1)).sum(1)
        return 70 + alone.sum(1) + together - wasted

    def cost(positions: np.ndarray) -> np.ndarray:
        heads, mlp = parts(positions)
        return 5 + (price[0] * heads + 4 * price[1] * mlp).sum(1)

    return Table(SearchSpace(choices), accuracy, cost)


@cache
def interacting(seed: int = 0) -> Table:
    """59,049 architectures: ten choices of three; a third of what decides is what pairs of them do."""
    rng = np.random.default_rng(seed)
    space = SearchSpace([Choice(f"layer{i}", (0, 1, 2)) for i in range(10)])
    alone, price = np.cumsum(rng.exponential(1.0, (10, 3)), 1), np.cumsum(rng.uniform(0.5, 3, (10, 3)), 1)
    pairs = rng.normal(0, 0.3, (10, 10, 3, 3))

    def accuracy(positions: np.ndarray) -> np.ndarray:
        both = [pairs[i, j, positions[:, i], positions[:, j]] for i in range(10) for j in range(i)]
        return 60 + _sum(alone, positions) + np.sum(both, axis=0)

    return Table(space, accuracy, lambda positions: _sum(price, positions))


@cache
def deceptive(seed: int = 0) -> Table:
    """65,536 architectures: two of eight choices are bad at their largest value, and good if both are."""
    rng = np.random.default_rng(seed)
    space = SearchSpace([Choice(f"layer{i}", (0, 1, 2, 3)) for i in range(8)])
    alone, price = np.cumsum(rng.exponential(0.6, (8, 4)), 1), np.cumsum(rng.uniform(0.5, 3, (8, 4)), 1)

    def accuracy(positions: np.ndarray) -> np.ndarray:
        largest = (positions[:, :2] == 3).sum(axis=1)
        return 60 + _sum(alone, positions) + np.array([0.0, -4.0, 4.0])[largest]

    return Table(space, accuracy, lambda positions: _sum(price, positions))


TABLES = {"NAS-Bench-MACRO": macro, "encoder": encoder, "interacting": interacting, "deceptive": deceptive}
