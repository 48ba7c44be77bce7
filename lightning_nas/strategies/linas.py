"""LINAS: evolution on predictors, which learn from everything that was measured."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

from lightning_nas.objectives import Maximize
from lightning_nas.predictors import Predictor, predictors
from lightning_nas.strategies._evolve import evolve, ranked, spread
from lightning_nas.strategies._strategy import seeds, strategies

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from lightning_nas.problem import Problem
    from lightning_nas.space import Architecture

__all__ = ["LINAS"]


@strategies.register("linas")
@dataclass(frozen=True)
class LINAS:
    """Measures a population, learns from it, lets evolution search the predictors, and measures its best.

    The first population is random. Each later one is what an evolution finds on predictors fitted on all that
    was measured: costs that are known beforehand are not predicted but counted, and constraints on them are
    kept. It begins at the measured networks, never proposes one of them, and of the last front that fits it
    takes those that are farthest apart; ``explore`` of the population are chosen by what they might reach,
    mean and uncertainty together.

    Args:
        population: networks measured between two fits, at least 2; None: a fifth of the budget, within 2
            and 50.
        predictor: name of the kind that learns each measured value.
        evaluations: by predictors, for each population.
        explore: share chosen by what they might reach, in [0, 1].

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
        population = min(50, max(2, budget // 5)) if self.population is None else self.population
        return _LINASSampler(self, problem, population, seed, proposal)


_PLANS: weakref.WeakKeyDictionary[Study, tuple[int, list[Architecture]]] = weakref.WeakKeyDictionary()
"""By study: how many measurements the present population was planned from, and what it is."""


class _LINASSampler(BaseSampler):
    """Makes one proposal: the next member of a population that depends on the measurements alone."""

    def __init__(self, settings: LINAS, problem: Problem, population: int, seed: int, proposal: int) -> None:
        self.settings, self.problem, self.population, self.seed = settings, problem, population, seed
        self._draws = RandomSampler(seed=seeds(seed, proposal, 1)[0])

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {choice.name: CategoricalDistribution(choice.values) for choice in self.problem.space}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        count = len(done) // self.population * self.population
        if count == 0:
            return {}  # the first population is drawn
        planned, members = _PLANS.get(study, (0, []))
        if planned != count:
            members = self._plan(done[:count])
            _PLANS[study] = (count, members)
        space = self.problem.space
        asked = {space.canonical(t.params).key for t in study.get_trials(deepcopy=False) if t.params}
        return dict(next((member for member in members if member.key not in asked), {}))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._draws.sample_independent(study, trial, param_name, param_distribution)

    def _plan(self, done: Sequence[FrozenTrial]) -> list[Architecture]:
        """The next population, from the first trials of the study."""
        space, settings = self.problem.space, self.settings
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, len(done), 1)))
        forecast = Forecast(self.problem, settings.predictor, done)
        options = np.array([len(choice.values) for choice in space])
        size = 2 * max(self.population, 25)
        drawn = (rng.random((size, len(options))) * options).astype(np.int64)
        start = space.canonical_positions(np.concatenate([forecast.measured, drawn]))
        start = start[ranked(forecast.losses(start))[:size]]
        generations = max(1, settings.evaluations // size - 2)
        rows, losses = evolve(start, options, forecast.losses, space.canonical_positions, generations, rng)
        measured = {row.tobytes() for row in space.canonical_positions(forecast.measured)}
        fresh = [i for i, row in enumerate(rows) if row.tobytes() not in measured]
        if not fresh:
            return []
        rows, losses = rows[fresh], losses[fresh]
        count = min(self.population, len(rows))
        hopeful = round(settings.explore * count)
        chosen = spread(losses, count - hopeful, forecast.losses(forecast.measured))
        left = np.setdiff1d(np.arange(len(rows)), chosen)
        if hopeful:
            taken = forecast.losses(rows[chosen], optimism=1.0)
            chosen += left[spread(forecast.losses(rows[left], optimism=1.0), hopeful, taken)].tolist()
        return space.at(rows[chosen])


class Forecast:
    """What is known, or expected, of any architecture after some measurements.

    Args:
        problem: what is searched for.
        kind: name of the predictor of each measured value.
        done: the measurements, as complete trials of a study.
    """

    def __init__(self, problem: Problem, kind: str, done: Sequence[FrozenTrial]) -> None:
        self.problem, space = problem, problem.space
        self.measured = space.indices([space.canonical(trial.params) for trial in done])
        features = space.encode_positions(self.measured)
        self.predictors: dict[str, Predictor] = {}
        for i, objective in enumerate(problem.objectives):
            if objective.name not in problem.costs:
                targets = np.array([trial.values[i] for trial in done])
                self.predictors[objective.name] = predictors[kind]().fit(features, targets)

    def losses(self, rows: NDArray[np.int64], optimism: float = 0.0) -> NDArray[np.float64]:
        """Objectives with the sign that makes smaller better, ``(n, objectives)``.

        Rows that break a constraint on costs are worse than all others, the more so the further they do.

        Args:
            rows: ``(n, choices)``, positions.
            optimism: standard deviations of a prediction that are counted in favour of an architecture.
        """
        problem = self.problem
        costs = problem.costs_of_all(problem.space.at(rows)) if problem.costs else [{}] * len(rows)
        features = problem.space.encode_positions(rows)
        columns = []
        for objective in problem.objectives:
            sign = -1.0 if isinstance(objective, Maximize) else 1.0
            if objective.name in problem.costs:
                columns.append(sign * np.array([cost[objective.name] for cost in costs]))
                continue
            mean, std = self.predictors[objective.name].predict(features)
            columns.append(sign * mean - (0.0 if std is None else optimism * std))
        values = np.stack(columns, axis=1)
        if problem.analytic:
            excess = np.array([problem.excess(cost) for cost in costs])
            scale = 1e6 * (np.abs(values).max(initial=1.0))
            values = np.where(excess[:, None] > 0, scale * (1 + excess[:, None]), values)
        return values
