"""What a search has evaluated: an image of the stored study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
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

__all__ = ["IDENTITY", "Proposal", "Record"]

IDENTITY = "lightning_nas"
"""The attribute of a study that says what it searches."""


@dataclass(frozen=True)
class Proposal:
    architecture: Architecture
    costs: dict[str, float]
    number: int  # how many were made before it
    notes: dict[str, Any]  # what the sampler wrote on its trial (NSGA-II: the generation)


class Record:
    """The finished evaluations: an image of the stored Optuna study, written in one transaction each.

    Nothing unfinished is ever written as a trial, so a killed process leaves none to clean up. Of two trials
    of one architecture the first counts: all who read a study agree.

    Attributes:
        candidates: in the order of the study.
        failed: likewise.
        trials: all of both, as samplers see them.
        keys: of their architectures.
        others: keys of architectures that other workers are evaluating, and the numbers of their proposals.
    """

    def __init__(self, problem: Problem, store: Store | None) -> None:
        self.problem, self.store = problem, store
        self.candidates: list[Candidate] = []
        self.failed: list[Failure] = []
        self.trials: list[FrozenTrial] = []
        self.keys: set[str] = set()
        self.others: dict[str, int] = {}
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
        return max(self._highest, *self.others.values(), -1) + 1

    def is_taken(self, key: str) -> bool:
        """Whether an architecture was evaluated, or is being evaluated by another worker."""
        return key in self.keys or key in self.others

    def refresh(self) -> None:
        """Read what was added to the store since the last time."""
        if self.store is None:
            return
        trials = self.store.trials()
        for trial in trials[self._read :]:
            if trial.state in (TrialState.COMPLETE, TrialState.FAIL):
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
            if proposal.architecture.key not in self.keys:
                study.add_trial(trial)

        self.refresh()
        if proposal.architecture.key in self.keys:
            return False
        self.store.again(write)
        self.refresh()
        return True

    def keep(self, proposal: Proposal, values: dict[str, float], failure: str | None = None) -> None:
        """Hold a finished evaluation here alone, if it is unknown."""
        if proposal.architecture.key not in self.keys:
            self._keep(self._finished(proposal, values, failure), proposal.architecture, values, failure)

    def _finished(self, proposal: Proposal, values: dict[str, float], failure: str | None) -> FrozenTrial:
        notes = {"proposal": proposal.number, "sampler": proposal.notes, "measured": values}
        return self._trial(proposal.architecture, values, notes, failure)

    def _restore(self, stored: FrozenTrial) -> None:
        notes = stored.user_attrs
        if "proposal" not in notes:  # of a process that uses Optuna directly
            return
        architecture = self.problem.space.canonical(stored.params)
        if architecture.key in self.keys:  # of a worker that was taken for dead
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
        return optuna.trial.create_trial(
            state=TrialState.COMPLETE if failure is None else TrialState.FAIL,
            values=[values[o.name] for o in self.problem.objectives] if failure is None else None,
            params=dict(architecture),
            distributions=dict(distributions),
            user_attrs=notes if failure is None else {**notes, "failure": failure},
            system_attrs=dict(notes["sampler"]),
            constraints={str(limit): _violation(limit, values[limit.name]) for limit in limits}
            if failure is None and limits
            else None,
        )

    def _keep(
        self, trial: FrozenTrial, architecture: Architecture, values: dict[str, float], failure: str | None
    ) -> None:
        self.trials.append(trial)
        self.keys.add(architecture.key)
        self._highest = max(self._highest, trial.user_attrs["proposal"])
        if failure is None:
            self.candidates.append(Candidate(architecture, values))
        else:
            self.failed.append(Failure(architecture, failure))


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
