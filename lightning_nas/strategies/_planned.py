"""Strategies that plan a whole population at a time, from what was measured before it."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

from lightning_nas.objectives import Maximize
from lightning_nas.predictors import Predictor, predictors
from lightning_nas.strategies._strategy import seeds

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from lightning_nas.problem import Problem
    from lightning_nas.space import Architecture

__all__ = ["Forecast", "PlannedSampler"]

_PLANS: weakref.WeakKeyDictionary[Study, tuple[int, list[Architecture]]] = weakref.WeakKeyDictionary()
"""By study: how many measurements the present population was planned from, and what it is."""


class PlannedSampler(BaseSampler):
    """Makes one proposal: the next member of a population that depends on the measurements before it alone.

    The first population is drawn at random. Whatever a plan lacks is drawn too.

    Args:
        problem: what is searched for.
        population: measurements between two plans.
        seed: of the whole search.
        proposal: how many proposals were made before.
    """

    def __init__(self, problem: Problem, population: int, seed: int, proposal: int) -> None:
        self.problem, self.population, self.seed = problem, population, seed
        self._draws = RandomSampler(seed=seeds(seed, proposal, 1)[0])

    @abstractmethod
    def plan(self, done: Sequence[FrozenTrial], rng: np.random.Generator) -> list[Architecture]:
        """The next population, from the complete trials before it."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {choice.name: CategoricalDistribution(choice.values) for choice in self.problem.space}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
        count = len(done) // self.population * self.population
        if count == 0:
            return {}
        planned, members = _PLANS.get(study, (0, []))
        if planned != count:
            words = np.random.SeedSequence((self.seed, count, 1))
            members = self.plan(done[:count], np.random.default_rng(words))
            _PLANS[study] = (count, members)
        space, since = self.problem.space, trials[done[count - 1].number + 1 :]
        asked = {space.canonical(trial.params).key for trial in since if trial.params}
        return dict(next((member for member in members if member.key not in asked), {}))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._draws.sample_independent(study, trial, param_name, param_distribution)


class Forecast:
    """What is known, or expected, of any architecture after some measurements.

    Args:
        problem: what is searched for.
        kind: name of the predictor of each measured value.
        done: the measurements, as complete trials of a study.
    """

    def __init__(self, problem: Problem, kind: str, done: Sequence[FrozenTrial]) -> None:
        self.problem, space = problem, problem.space
        index = space.indices([space.canonical(trial.params) for trial in done])
        self.features = space.encode_positions(index)
        self.measured = space.canonical_positions(index)
        self._known = {row.tobytes() for row in self.measured}
        self._excess: dict[bytes, float] = {}
        self.values = np.array([trial.values for trial in done])
        self._worst = 1e6 * float(np.abs(self.values).max(initial=1.0))
        self.predictors: dict[str, Predictor] = {
            objective.name: predictors[kind]().fit(self.features, self.values[:, i])
            for i, objective in enumerate(problem.objectives)
            if objective.name not in problem.costs
        }

    def losses(self, rows: NDArray[np.int64], optimism: float = 0.0) -> NDArray[np.float64]:
        """Objectives with the sign that makes smaller better, ``(n, objectives)``.

        Rows that break a constraint on costs are worse than all others, the more so the further they do.

        Args:
            rows: ``(n, choices)``, canonical positions.
            optimism: standard deviations of a prediction that are counted in favour of an architecture.
        """
        problem = self.problem
        costs = problem.costs_of_all(problem.space.at(rows)) if problem.costs else [{}] * len(rows)
        features, columns = problem.space.encode_positions(rows), []
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
            self._excess.update((row.tobytes(), e) for row, e in zip(rows, excess, strict=True))
            values = np.where(excess[:, None] > 0, self._worst * (1 + excess[:, None]), values)
        return values

    def is_wanted(self, row: NDArray[np.int64]) -> bool:
        """Whether a row that losses were asked for is not measured, and keeps the constraints on costs."""
        key = row.tobytes()
        return key not in self._known and self._excess.get(key, 0.0) <= 0
