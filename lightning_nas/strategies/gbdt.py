"""GBDT-NAS: boosted trees say which architectures to measure, and which options to forget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from optuna.samplers import BaseSampler
from typing_extensions import override

from lightning_nas.predictors import GBDT as Trees
from lightning_nas.strategies._evolve import Rows, spread
from lightning_nas.strategies._planned import Forecast, PlannedSampler, population_for
from lightning_nas.strategies._strategy import strategies

if TYPE_CHECKING:
    from lightning_nas.problem import Problem

__all__ = ["GBDTNAS", "pruned_options"]


@strategies.register("gbdt")
@dataclass(frozen=True)
class GBDTNAS:
    """Measures a population, fits boosted trees, draws many architectures and measures those predicted best.

    Options that lower what the trees predict, on average over the networks that have them (exact SHAP
    values), are no longer drawn: at most ``prune`` more after each population, and never all of a choice.

    Args:
        population: networks measured at random first, and half as many between two fits, at least 2; None: a
            fifth of the budget, within 5 and 50.
        drawn: architectures that are predicted for each batch, at least 1.
        prune: options to forget after as many measurements as the population has, at least 0.

    Raises:
        ValueError: for a value out of its range.

    Example:
        >>> GBDTNAS(population=25)
        GBDTNAS(population=25, drawn=5000, prune=5)

    Reference: Luo et al., Accuracy Prediction with Non-neural Model for Neural Architecture Search, 2020,
    sections 3 and 4 (first-order pruning). For several objectives the best are fronts, and an option is
    forgotten only if it is bad for each of them, so one that is bad but cheap stays.
    """

    population: int | None = None
    drawn: int = 5_000
    prune: int = 5

    def __post_init__(self) -> None:
        if self.population is not None and self.population < 2:
            raise ValueError(f"GBDTNAS: population must be at least 2, got {self.population}.")
        if self.drawn < 1 or self.prune < 0:
            raise ValueError(
                f"GBDTNAS: drawn must be at least 1 and prune at least 0, got {self.drawn} and {self.prune}."
            )

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """See :class:`~lightning_nas.strategies.Strategy`."""
        population = population_for(budget) if self.population is None else self.population
        return _GBDTSampler(self, problem, population, seed, proposal)


def pruned_options(gains: NDArray[np.float64], sizes: Sequence[int], count: int) -> list[NDArray[np.int64]]:
    """The options of each choice that are left.

    Args:
        gains: ``(sum of sizes,)``, what each option adds on average; the most negative ones go first.
        sizes: options of each choice.
        count: at most so many go.

    Returns:
        For each choice the positions left, at least one.

    Example:
        >>> pruned_options(np.array([-3.0, 1.0, -2.0, -1.0]), (2, 2), 9)
        [array([1]), array([1])]
    """
    owner = np.repeat(np.arange(len(sizes)), sizes)
    left = np.ones(len(gains), dtype=np.bool_)
    for i in np.argsort(gains, kind="stable"):
        if count <= 0 or gains[i] >= 0:
            break
        if left[owner == owner[i]].sum() > 1:
            left[i], count = False, count - 1
    return [np.flatnonzero(left[owner == choice]) for choice in range(len(sizes))]


class _GBDTSampler(PlannedSampler):
    def __init__(
        self, settings: GBDTNAS, problem: Problem, population: int, seed: int, proposal: int
    ) -> None:
        super().__init__(problem, population, seed, proposal, "gbdt")
        self.settings = settings

    @override
    def plan(self, forecast: Forecast, rng: np.random.Generator) -> Rows:
        space = self.problem.space
        rounds = len(forecast.measured) // self.population
        sizes = [len(choice.values) for choice in space]
        options = pruned_options(self._gains(forecast), sizes, rounds * self.settings.prune)
        columns = [left[rng.integers(len(left), size=self.settings.drawn)] for left in options]
        rows = np.unique(space.canonical_positions(np.stack(columns, axis=1)), axis=0)
        losses = forecast.losses(rows)
        wanted = forecast.wanted(rows)
        if not wanted:
            return rows[:0]
        rows, losses = rows[wanted], losses[wanted]
        count = min(self.batch, len(rows))
        return rows[spread(losses, count, forecast.losses(forecast.measured))]

    def _gains(self, forecast: Forecast) -> NDArray[np.float64]:
        """What each option adds to the objectives, on average over those that have it: the most, scaled.

        An option that no measured network has adds nothing.
        """
        on = forecast.features > 0
        count, gains = np.maximum(on.sum(0), 1), []
        for objective in self.problem.objectives:
            if objective.name in forecast.predictors:
                trees = cast(Trees, forecast.predictors[objective.name])
                values = trees.contributions(forecast.features)[:, :-1]
                loss = np.where(on, values, 0.0).sum(0) / count
            else:  # a cost that is counted: beside the average network
                known = self.problem.costs_of_all(
                    self.problem.space.at(forecast.measured), self.problem.counted
                )
                costs = forecast.signs[objective.name] * np.array([cost[objective.name] for cost in known])
                loss = np.where(on.any(0), on.T @ (costs - costs.mean()) / count, 0.0)
            gains.append(-loss / np.abs(loss).max(initial=1e-12))
        gain: NDArray[np.float64] = np.max(gains, axis=0)
        return gain
