"""Which architecture is evaluated next: the strategy's, or an unseen one where it only repeats itself."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain

import numpy as np
import optuna
from optuna.trial import TrialState

from lightning_nas._record import Proposal, Record
from lightning_nas._storage import quiet_optuna
from lightning_nas.problem import Problem
from lightning_nas.results import keeps, losses, non_dominated
from lightning_nas.space import Architecture
from lightning_nas.strategies import PREDICTED, SHARE, Strategy

__all__ = ["Proposals"]

_PATIENCE = 25  # proposals in a row that are known or rejected, after which the space itself is asked
_DRAWS = 1_000  # random architectures then tried
_ENUMERABLE = 100_000  # architectures up to which a space is then looked through one by one
_WALKS = 50  # in larger spaces: random starts from which the constraints are walked to, by neighbours


class Proposals:
    """Asks the strategy until it names an architecture that is unknown and keeps the constraints on costs.

    The sampler sees an Optuna study in memory that holds the recorded trials alone, in canonical form; what
    was asked and not recorded leaves no trace in it, and the generators of each proposal are seeded by its
    number. A worker counts on from the highest number that any has used, so workers do not repeat each other.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy,
        budget: int,
        seed: int,
        record: Record,
        initial: Sequence[Architecture],
    ) -> None:
        self.problem, self.strategy, self.record = problem, strategy, record
        self.budget, self.seed = budget, seed
        self.duplicates = self.rejected = 0
        self._number = 0
        self._sees_shares = getattr(strategy, "partial", False)
        self._told = 0  # trials of the record that the sampler knows
        self._nearest: dict[str, float] | None = None
        self._initial = [
            a for a in dict.fromkeys(initial) if self._keeps(problem.costs_of(a, problem.bounded))
        ]
        with quiet_optuna():
            directions = [objective.direction for objective in problem.objectives]
            self._study = optuna.create_study(directions=directions)

    def next(self) -> Proposal | None:
        """The next architecture to evaluate; None when there is none left that others don't evaluate.

        Raises:
            ValueError: if nothing seen so far keeps the constraints.
        """
        record = self.record
        for trial in record.trials[self._told :]:
            if self._sees_shares or trial.system_attrs.get(SHARE, 1.0) == 1:
                self._study.add_trial(trial)
        self._told = len(record)
        self._number = max(self._number, record.next_proposal)
        for _ in range(_PATIENCE + len(record.others)):
            if len(record.keys) + len(record.others) >= self.problem.space.size:
                return None
            proposal = self._ask(next((a for a in self._initial if not record.is_taken(a.key)), None))
            if record.is_taken(proposal.architecture.key, proposal.share):
                self.duplicates += 1
            elif self._keeps(proposal.costs):
                return self._counted(proposal)
        unseen = self._unseen(np.random.default_rng((self.seed, self._number)))
        if unseen is not None:
            return self._counted(self._ask(unseen))
        if not record.others:
            self._say_why_none_is_left()
        return None

    def _ask(self, instead: Architecture | None) -> Proposal:
        """What the strategy's sampler proposes, or a given architecture in its place."""
        self._study.sampler = self.strategy.sampler(self.problem, self.budget, self.seed, self._number)
        trial = self._study.ask(self.problem.distributions)
        is_chosen = bool(trial.relative_params) or self.record.has_learnt
        asked = self._study.tell(trial, state=TrialState.FAIL)
        self._number += 1
        architecture = self.problem.space.canonical(asked.params)
        origin = "strategy" if is_chosen else "start"
        notes = asked.system_attrs
        if instead is not None:
            architecture, origin = instead, "initial" if instead in self._initial else "space"
            notes = {name: value for name, value in notes.items() if name not in (PREDICTED, SHARE)}
        costs = self.problem.costs_of(architecture, self.problem.bounded)
        return Proposal(architecture, costs, self._number - 1, notes, origin)

    def _counted(self, proposal: Proposal) -> Proposal:
        """With all its costs: some take time to measure, and only what will be evaluated is worth it."""
        return replace(proposal, costs=self.problem.costs_of(proposal.architecture))

    def _keeps(self, costs: dict[str, float]) -> bool:
        excess = self.problem.excess(costs)
        if excess > 0:
            self.rejected += 1
            self._nearest = min(self._nearest or costs, costs, key=self.problem.excess)
        return excess <= 0

    def _is_wanted(self, architecture: Architecture) -> bool:
        return not self.record.is_taken(architecture.key) and self._keeps(
            self.problem.costs_of(architecture, self.problem.bounded)
        )

    @cached_property
    def _feasible(self) -> dict[str, Architecture]:
        """Every architecture of a small space that keeps the constraints on costs, by key."""
        everything = list(self.problem.space.enumerate())
        costs = self.problem.costs_of_all(everything, self.problem.bounded)
        self._nearest = min(
            (c for c in costs if self.problem.excess(c) > 0), key=self.problem.excess, default=None
        )
        return {a.key: a for a, c in zip(everything, costs, strict=True) if self.problem.excess(c) <= 0}

    def _unseen(self, rng: np.random.Generator) -> Architecture | None:
        """An architecture that is not recorded and keeps the constraints on costs, wherever it comes from."""
        space, problem, candidates = self.problem.space, self.problem, self.record.candidates
        kept = [c for c in candidates if keeps(problem.limits, c)]
        front = [c for c, on in zip(kept, non_dominated(losses(problem.objectives, kept)), strict=True) if on]
        beside_front = list(chain.from_iterable(space.neighbours(c.architecture) for c in front))
        near = next(
            filter(self._is_wanted, map(beside_front.__getitem__, rng.permutation(len(beside_front)))), None
        )
        if near is not None:
            return near
        if space.size <= _ENUMERABLE:
            unseen = [a for key, a in self._feasible.items() if not self.record.is_taken(key)]
            return unseen[rng.integers(len(unseen))] if unseen else None
        draws = (space.sample(rng) for _ in range(_DRAWS))
        walks = (self._walk(space.sample(rng), rng) for _ in range(_WALKS))
        beside = (near for c in candidates for near in space.neighbours(c.architecture))
        return next(filter(self._is_wanted, chain(draws, walks, beside)), None)

    def _walk(self, architecture: Architecture, rng: np.random.Generator) -> Architecture:
        """Step to a neighbour that breaks the constraints less, until none does."""

        def excess(of: Architecture) -> float:
            return self.problem.excess(self.problem.costs_of(of, self.problem.bounded))

        here = excess(architecture)
        while here > 0:
            around = list(self.problem.space.neighbours(architecture))
            order = map(around.__getitem__, rng.permutation(len(around)))
            step = next(((n, e) for n in order if (e := excess(n)) < here), None)
            if step is None:
                break
            architecture, here = step
        return architecture

    def _say_why_none_is_left(self) -> None:
        if self._nearest is None:
            return
        limits = self.problem.analytic
        values = ", ".join(f"{limit.name} = {self._nearest[limit.name]:g}" for limit in limits)
        asked = (
            f"after {_PATIENCE} proposals in a row and {self.rejected} rejections in all, no unseen "
            f"architecture was found that keeps {' and '.join(map(str, limits))}. Nearest: {values}."
        )
        if not self.record.candidates:
            raise ValueError(f"search: {asked} Widen the constraints or the space.")
        warnings.warn(f"search ends early: {asked}", UserWarning, stacklevel=4)
