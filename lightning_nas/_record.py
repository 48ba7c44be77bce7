"""What a search has evaluated: an image of the stored study."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lightning_nas._storage import Store, made
from lightning_nas.errors import StudyMismatchError
from lightning_nas.objectives import Limit
from lightning_nas.problem import Problem
from lightning_nas.registry import nearest
from lightning_nas.results import Candidate, Failure
from lightning_nas.space import Architecture
from lightning_nas.strategies import PREDICTED, SHARE

__all__ = ["IDENTITY", "ROUNDING", "Proposal", "Record"]

IDENTITY = "lightning_nas"
"""The attribute of a study that says what it searches."""
_REPEAT = "lightning_nas:repeat:"
ROUNDING = 1e-9
"""Of sums of shares."""


@dataclass(frozen=True)
class Proposal:
    architecture: Architecture
    costs: dict[str, float]
    number: int  # how many were made before it
    notes: dict[str, Any]  # what the sampler wrote on its trial (NSGA-II: the generation)
    origin: str = ""  # as of Candidate

    @property
    def share(self) -> float:
        """On how much of the data it is to be evaluated, in (0, 1]."""
        return float(self.notes.get(SHARE, 1.0))

    def candidate(self, values: dict[str, float]) -> Candidate:
        """What it becomes with these values."""
        return Candidate(self.architecture, values, self.origin, self.notes.get(PREDICTED, {}))


class Record:
    """The finished evaluations: an image of the stored Optuna study, written in one transaction each.

    Nothing unfinished is ever written as a trial, so a killed process leaves none to clean up. Of two trials
    of one architecture the first counts: all who read a study agree.

    Attributes:
        candidates: in the order of the study.
        failed: likewise.
        trials: all of both, and evaluations on a share of the data, as samplers see them.
        keys: of architectures that are candidates or failed.
        shares: on how much of the data an architecture was partly evaluated at most, by key.
        spent: how many whole evaluations' worth all of that was.
        has_learnt: whether some candidate was chosen by the strategy, and not drawn at random.
        repeats: later measurements of candidates, by key.
        others: keys of architectures that other workers are evaluating, with the numbers of their proposals
            and the shares.
    """

    def __init__(self, problem: Problem, store: Store | None) -> None:
        self.problem, self.store = problem, store
        self.candidates: list[Candidate] = []
        self.failed: list[Failure] = []
        self.trials: list[FrozenTrial] = []
        self.keys: set[str] = set()
        self.shares: dict[str, float] = {}
        self.spent = 0.0
        self.has_learnt = False
        self.repeats: dict[str, list[dict[str, float]]] = {}
        self.others: dict[str, tuple[int, float]] = {}
        self._highest = -1  # number of a proposal
        self._read = 0  # trials of the store that were looked at

    @classmethod
    def opened(
        cls, problem: Problem, storage: str | Path | BaseStorage | None, name: str, patience: float = 30.0
    ) -> Record:
        """The study of this name, made if need be, with what it holds.

        Raises:
            StudyMismatchError: if the stored study is another one.
            StorageError: if the storage cannot be opened.
        """
        if storage == "memory":
            return cls(problem, None)
        directions = [objective.direction for objective in problem.objectives]
        return cls.of(problem, made(storage, name, directions, patience))

    @classmethod
    def of(cls, problem: Problem, store: Store) -> Record:
        """As :meth:`opened`, of a study that is open."""
        directions = [objective.direction for objective in problem.objectives]
        where = f"the study {store.study.study_name!r} in {store.where}"
        # Trials first: a process that opens the study at this moment writes its description before them.
        is_empty = not store.trials()
        stored, description = store.attributes().get(IDENTITY), problem.description()
        if stored is None:
            if not is_empty or [d.name.lower() for d in store.study.directions] != directions:
                raise StudyMismatchError(
                    f"search: {where} was not written by a search of this package. Give another name or "
                    "storage."
                )
            store.set(IDENTITY, description)
        elif differences := _differences(stored, description):
            raise StudyMismatchError(
                f"search: {where} is of another search: {'; '.join(differences)}. Give another name or "
                "storage; the stored study is as it was."
            )
        record = cls(problem, store)
        record.refresh()
        record.read_repeats()
        return record

    def __len__(self) -> int:
        return len(self.trials)

    @property
    def where(self) -> str:
        """The storage, as messages call it."""
        return "memory" if self.store is None else self.store.where

    @property
    def next_proposal(self) -> int:
        """One more than any number of a proposal that is known."""
        return max(self._highest, *(number for number, _ in self.others.values()), -1) + 1

    def knows(self, key: str, share: float = 1.0) -> bool:
        """Whether an architecture was evaluated on so much of the data, or failed."""
        return key in self.keys or 0 < share <= self.shares.get(key, 0.0)

    def is_taken(self, key: str, share: float = 1.0) -> bool:
        """Whether it is known, or being evaluated by another worker."""
        return self.knows(key, share) or key in self.others

    def has_room(self, budget: int, share: float = 1.0) -> bool:
        """Whether the budget has so much left that nobody is spending."""
        return budget - self.spent - sum(part for _, part in self.others.values()) >= share - ROUNDING

    def refresh(self) -> None:
        """Read what was added to the store since the last time."""
        if self.store is None:
            return
        trials = self.store.trials()
        for trial in trials[self._read :]:
            if trial.state in (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED):
                self._restore(trial)
        self._read = len(trials)

    def add(self, proposal: Proposal, values: dict[str, float], failure: str | None = None) -> bool:
        """Write down a finished evaluation; False if the study has one of this architecture already."""
        if self.store is None:
            self.keep(proposal, values, failure)
            return True
        study, trial = self.store.study, self._finished(proposal, values, failure)

        def write() -> None:
            self.refresh()  # an attempt that seemed to fail may have been written
            if not self.knows(proposal.architecture.key, proposal.share):
                study.add_trial(trial)

        self.refresh()
        if self.knows(proposal.architecture.key, proposal.share):
            return False
        self.store.again(write)
        self.refresh()
        return True

    def keep(self, proposal: Proposal, values: dict[str, float], failure: str | None = None) -> None:
        """Hold a finished evaluation here alone, if it is unknown."""
        if not self.knows(proposal.architecture.key, proposal.share):
            self._keep(self._finished(proposal, values, failure), proposal.architecture, values, failure)

    def _finished(self, proposal: Proposal, values: dict[str, float], failure: str | None) -> FrozenTrial:
        notes = {
            "proposal": proposal.number,
            "origin": proposal.origin,
            "sampler": proposal.notes,
            "measured": values,
        }
        return self._trial(proposal.architecture, values, notes, failure)

    def _restore(self, stored: FrozenTrial) -> None:
        notes = stored.user_attrs
        if "proposal" not in notes:  # of a process that uses Optuna directly
            return
        architecture = self.problem.space.canonical(stored.params)
        share = notes["sampler"].get(SHARE, 1.0)
        if self.knows(architecture.key, share):  # of a worker that was taken for dead
            return
        values = {**notes["measured"]}
        if any(limit.name not in values for limit in self.problem.analytic):
            values = {**values, **self.problem.costs_of(architecture)}
        for limit in self.problem.limits:
            if limit.name not in values:
                raise StudyMismatchError(
                    f"search: the study in {self.where} was made without the constraint {limit}, and its "
                    f"candidates have no {limit.name!r}. {nearest(limit.name, values)}"
                )
        failure = notes.get("failure")
        trial = self._trial(architecture, values, {**notes, "measured": values}, failure)
        self._keep(trial, architecture, values, failure)

    def _trial(
        self, architecture: Architecture, values: dict[str, float], notes: dict[str, Any], failure: str | None
    ) -> FrozenTrial:
        distributions = self.problem.distributions
        limits = self.problem.limits
        whole = TrialState.PRUNED if notes["sampler"].get(SHARE, 1.0) < 1 else TrialState.COMPLETE
        state = whole if failure is None else TrialState.FAIL
        is_candidate = state is TrialState.COMPLETE
        return optuna.trial.create_trial(
            state=state,
            values=[values[o.name] for o in self.problem.objectives] if is_candidate else None,
            params=dict(architecture),
            distributions=dict(distributions),
            user_attrs=notes if failure is None else {**notes, "failure": failure},
            system_attrs=dict(notes["sampler"]),
            constraints={str(limit): _violation(limit, values[limit.name]) for limit in limits}
            if is_candidate and limits
            else None,
        )

    def _keep(
        self, trial: FrozenTrial, architecture: Architecture, values: dict[str, float], failure: str | None
    ) -> None:
        self.trials.append(trial)
        self._highest = max(self._highest, trial.user_attrs["proposal"])
        share = trial.system_attrs.get(SHARE, 1.0)
        self.spent += share
        if trial.state is TrialState.PRUNED:
            self.shares[architecture.key] = max(share, self.shares.get(architecture.key, 0.0))
            return
        self.keys.add(architecture.key)
        origin = trial.user_attrs.get("origin", "")
        self.has_learnt |= origin == "strategy"
        if failure is None:
            predicted = trial.user_attrs["sampler"].get(PREDICTED, {})
            self.candidates.append(Candidate(architecture, values, origin, predicted))
        else:
            self.failed.append(Failure(architecture, failure))

    def repeat(self, architecture: Architecture, values: dict[str, float]) -> None:
        """Write down a later measurement of a candidate."""
        known = self.repeats.setdefault(architecture.key, [])
        if self.store is not None:
            row = {"architecture": dict(architecture), "measured": values}
            digest = hashlib.sha256(architecture.key.encode()).hexdigest()[:16]  # a key may be too long
            self.store.set(f"{_REPEAT}{len(known):04d}:{digest}", row)
        known.append(values)

    def read_repeats(self) -> None:
        """Read all later measurements, others' included."""
        if self.store is None:
            return
        self.repeats, attributes = {}, self.store.attributes()
        for name in sorted(name for name in attributes if name.startswith(_REPEAT)):
            key = self.problem.space.canonical(attributes[name]["architecture"]).key
            self.repeats.setdefault(key, []).append({**attributes[name]["measured"]})

    def with_repeats(self) -> tuple[Candidate, ...]:
        """The candidates, with their later measurements where there are any."""
        if not self.repeats:
            return tuple(self.candidates)
        usable = {
            key: tuple(values for values in rows if self.problem.fault(values) is None)
            for key, rows in self.repeats.items()
        }
        return tuple(replace(c, repeats=usable.get(c.architecture.key, ())) for c in self.candidates)


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How two descriptions of a search differ, each in words."""
    wanted = json.loads(json.dumps(wanted))
    before, after = ({row["name"]: row for row in d["space"]["choices"]} for d in (stored, wanted))
    found = [f"it has the choice {name!r}, this space has not" for name in before if name not in after]
    found += [f"it lacks the choice {name!r}" for name in after if name not in before]
    for name in before.keys() & after.keys():
        for what in dict.fromkeys((*before[name], *after[name])):
            if before[name].get(what) != after[name].get(what):
                found.append(
                    f"{what} of {name!r} are {before[name].get(what)} there, {after[name].get(what)} here"
                )
    if stored["objectives"] != wanted["objectives"]:
        there, here = (", ".join(map(" ".join, d["objectives"])) for d in (stored, wanted))
        found.append(f"its objectives are {there}; here they are {here}")
    return sorted(found)


def _violation(limit: Limit, value: float) -> float:
    """Optuna's convention: feasible at or below 0."""
    return min(limit.excess(value), 0.0) if limit.holds(value) else max(limit.excess(value), 1e-12)
