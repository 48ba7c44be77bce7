"""Strategies that plan a whole population at a time, from what was measured before it."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from optuna.trial import TrialState

from lightning_nas.objectives import Maximize
from lightning_nas.predictors import Predictor, predictors
from lightning_nas.space import Architecture
from lightning_nas.strategies._evolve import Losses, Rows
from lightning_nas.strategies._strategy import PREDICTED, DrawingSampler, note, seeds

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from lightning_nas.problem import Problem

__all__ = ["Forecast", "PlannedSampler", "population_for"]

_Plan: TypeAlias = list[tuple[Architecture, dict[str, float]]]

_PLANS: weakref.WeakKeyDictionary[Study, tuple[int, _Plan]] = weakref.WeakKeyDictionary()
"""By study: how many measurements the present batch was planned from, its members and predictions."""


def population_for(budget: int) -> int:
    """Networks measured at random first where nobody says: a fifth of the budget, within 5 and 50."""
    return min(50, max(5, budget // 5))


class PlannedSampler(DrawingSampler):
    """Makes one proposal: the next member of a batch that depends on the measurements before it alone.

    The first population is drawn at random; each later batch is half as large. What a plan lacks is drawn
    too.

    Args:
        problem: what is searched for.
        population: measurements before the first plan.
        seed: of the whole search.
        proposal: how many proposals were made before.
        predictor: name of the kind that learns each measured value.
    """

    def __init__(self, problem: Problem, population: int, seed: int, proposal: int, predictor: str) -> None:
        super().__init__(problem.space, seeds(seed, proposal, 1)[0])
        self.problem, self.population, self.seed, self.predictor = problem, population, seed, predictor
        self.batch = max(1, population // 2)  # learning twice as often is worth more than larger batches

    @abstractmethod
    def plan(self, forecast: Forecast, rng: np.random.Generator) -> Rows:
        """The next batch, from what is known and expected after the measurements before it.

        Returns:
            ``(members, choices)``, positions of options.
        """

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next member that was not asked for yet; nothing where there is none."""
        trials = study.get_trials(deepcopy=False)
        done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
        if len(done) < self.population:
            return {}
        count = len(done) - (len(done) - self.population) % self.batch
        planned, members = _PLANS.get(study, (0, []))
        if planned != count:
            words = np.random.SeedSequence((self.seed, count, 1))
            forecast = Forecast(self.problem, self.predictor, done[:count])
            rows = self.plan(forecast, np.random.default_rng(words))
            members = list(zip(self.problem.space.at(rows), forecast.predictions(rows), strict=True))
            _PLANS[study] = (count, members)
        space, since = self.problem.space, trials[done[count - 1].number + 1 :]
        positions = space.indices([trial.params for trial in since if trial.params])
        asked = {architecture.key for architecture in space.at(positions)}
        member, predicted = next(((m, p) for m, p in members if m.key not in asked), ({}, None))
        if predicted:
            note(study, trial, PREDICTED, predicted)
        return dict(member)


class Forecast:
    """What is known, or expected, of any architecture after some measurements.

    Costs that are computed are counted; all else that objectives and constraints need is predicted.

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
        values = [trial.user_attrs["measured"] for trial in done]
        self._worst = 1e6 * max(1.0, *(abs(row[name]) for row in values for name in problem.needed))
        # Objectives as losses: which way one is written makes no difference.
        signs = {o.name: -1.0 for o in problem.objectives if isinstance(o, Maximize)}
        self.signs = {name: signs.get(name, 1.0) for name in problem.needed}
        self.predictors: dict[str, Predictor] = {
            name: predictors[kind]().fit(self.features, [sign * row[name] for row in values])
            for name, sign in self.signs.items()
            if name not in problem.counted
        }

    def losses(self, rows: Rows) -> Losses:
        """Objectives with the sign that makes smaller better, ``(n, objectives)``.

        Rows that break a constraint are worse than all others, the more so the further they do.

        Args:
            rows: ``(n, choices)``, canonical positions.
        """
        problem = self.problem
        architectures = problem.space.at(rows) if problem.counted else [Architecture({})] * len(rows)
        known = problem.costs_of_all(architectures, problem.counted)
        features, columns = problem.space.encode_positions(rows), []
        expected = {name: own.predict(features).mean for name, own in self.predictors.items()}
        for objective in problem.objectives:
            name = objective.name
            if name in problem.counted:
                columns.append(self.signs[name] * np.array([cost[name] for cost in known]))
            else:
                columns.append(expected[name])
        values = np.stack(columns, axis=1)
        if problem.limits:
            for i, row in enumerate(known):
                row.update((name, self.signs[name] * float(mean[i])) for name, mean in expected.items())
            excess = np.array([problem.excess_of(problem.limits, row) for row in known])
            self._excess.update((row.tobytes(), e) for row, e in zip(rows, excess, strict=True))
            values = np.where(excess[:, None] > 0, self._worst * (1 + excess[:, None]), values)
        return values

    def predictions(self, rows: Rows) -> list[dict[str, float]]:
        """What is expected of the values that are not counted, for each row.

        Args:
            rows: ``(n, choices)``, canonical positions.
        """
        if not len(rows):
            return []
        features = self.problem.space.encode_positions(rows)
        means = {name: self.signs[name] * own.predict(features).mean for name, own in self.predictors.items()}
        return [{name: float(mean[i]) for name, mean in means.items()} for i in range(len(rows))]

    def wanted(self, rows: Rows) -> list[int]:
        """Of rows that losses were asked for, those not measured that should keep the constraints."""
        keys = [row.tobytes() for row in rows]
        return [i for i, k in enumerate(keys) if k not in self._known and self._excess.get(k, 0.0) <= 0]
