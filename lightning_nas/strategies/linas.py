"""LINAS: evolution on predictors, which learn from everything that was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from optuna.samplers import BaseSampler
from typing_extensions import override

from lightning_nas.predictors import predictors
from lightning_nas.strategies._evolve import Rows, evolve, ranked, spread, unlike
from lightning_nas.strategies._planned import Forecast, PlannedSampler, population_for
from lightning_nas.strategies._strategy import strategies

if TYPE_CHECKING:
    from lightning_nas.problem import Problem

__all__ = ["LINAS"]


@strategies.register("linas")
@dataclass(frozen=True)
class LINAS:
    """Measures a population, learns from it, lets evolution search the predictors, and measures its best.

    The first population is random. Each later batch is what an evolution finds on predictors fitted on all
    that was measured: costs that are known beforehand are not predicted but counted, and constraints on them
    are kept. It begins at the measured networks, never proposes one of them, and of the last front that fits
    it takes those that are farthest apart. ``explore`` of the batch are the ones least like any that was
    measured, of the better quarter: a predictor is often sure of what it has never seen.

    Args:
        population: networks measured at random first, and half as many between two fits, at least 2; None: a
            fifth of the budget, within 5 and 50.
        predictor: name of the kind that learns each measured value.
        evaluations: by predictors, for each batch; four for each architecture of a small space.
        explore: share chosen for being unlike, in [0, 1].

    Raises:
        ValueError: for a value out of its range, or an unknown predictor.

    Example:
        >>> LINAS(population=25)
        LINAS(population=25, predictor='auto', evaluations=10000, explore=0.2)

    Reference: Cummings et al., A Hardware-Aware Framework for Accelerating Neural Architecture Search Across
    Modalities, 2022 (LINAS); Sarah et al., A Hardware-Aware System for Accelerating Deep Neural Network
    Optimization, 2022.
    """

    population: int | None = None
    predictor: str = "auto"
    evaluations: int = 10_000
    explore: float = 0.2

    def __post_init__(self) -> None:
        if self.population is not None and self.population < 2:
            raise ValueError(f"LINAS: population must be at least 2, got {self.population}.")
        if self.evaluations < 1 or not 0 <= self.explore <= 1:
            raise ValueError(
                "LINAS: evaluations must be at least 1 and explore in [0, 1], got "
                f"{self.evaluations} and {self.explore}."
            )
        predictors[self.predictor]  # unknown names are refused here

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """See :class:`~lightning_nas.strategies.Strategy`."""
        population = population_for(budget) if self.population is None else self.population
        return _LINASSampler(self, problem, population, seed, proposal)


class _LINASSampler(PlannedSampler):
    def __init__(self, settings: LINAS, problem: Problem, population: int, seed: int, proposal: int) -> None:
        super().__init__(problem, population, seed, proposal, settings.predictor)
        self.settings = settings

    @override
    def plan(self, forecast: Forecast, rng: np.random.Generator) -> Rows:
        space, settings = self.problem.space, self.settings
        options = np.array([len(choice.values) for choice in space])
        size = 2 * max(self.population, 50)
        drawn = (rng.random((size, len(options))) * options).astype(np.int64)
        start = np.concatenate([forecast.measured, space.canonical_positions(drawn)])
        start = start[ranked(forecast.losses(start))[:size]]
        generations = max(1, min(settings.evaluations, 4 * space.size) // size - 2)
        rows, losses = evolve(start, options, forecast.losses, space.canonical_positions, generations, rng)
        wanted = forecast.wanted(rows)
        if not wanted:
            return rows[:0]
        rows, losses = rows[wanted], losses[wanted]
        count = min(self.batch, len(rows))
        strange = round(settings.explore * count)
        chosen = spread(losses, count - strange, forecast.losses(forecast.measured))
        pool = [i for i in ranked(losses)[: max(len(rows) // 4, count)][:1_000] if i not in set(chosen)]
        known = np.concatenate([forecast.measured, rows[chosen]])
        chosen += [pool[i] for i in unlike(rows[pool], known, strange)]
        return rows[chosen]
