"""What a search has evaluated, and the Optuna storage in which it is kept."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any, Literal

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from lightning_nas.errors import NASError, StudyMismatchError
from lightning_nas.objectives import Limit
from lightning_nas.problem import Problem
from lightning_nas.registry import nearest
from lightning_nas.results import Candidate, Failure
from lightning_nas.space import Architecture

__all__ = ["Proposal", "Record", "quiet_optuna"]

_WAITS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 1.6)  # seconds at most before each attempt to open a database


@dataclass(frozen=True)
class Proposal:
    architecture: Architecture
    costs: dict[str, float]
    number: int  # how many were made before it
    notes: dict[str, Any]  # what the sampler wrote on its trial (NSGA-II: the generation)


class Record:
    """The finished evaluations: an image of the stored Optuna study, written in one transaction each.

    Nothing unfinished is ever written, so a killed process leaves nothing to clean up: its last candidate was
    not begun as far as the study knows. Several workers can share a storage by reading, before each proposal,
    the trials that others added.
    """

    def __init__(self, problem: Problem, study: optuna.Study | None, where: str) -> None:
        self.problem, self.where = problem, where
        self.candidates: list[Candidate] = []
        self.failed: list[Failure] = []
        self.trials: list[FrozenTrial] = []
        self.keys: set[str] = set()
        self._study = study

    @classmethod
    def opened(cls, problem: Problem, storage: str | Path | BaseStorage | None, name: str) -> Record:
        """The study of this name, made if need be, with what it holds.

        Raises:
            StudyMismatchError: if the stored study is another one.
            NASError: if the database cannot be opened.
        """
        if storage == "memory":
            return cls(problem, None, "memory")
        backend, where = _storage(storage, name)
        directions = [objective.direction for objective in problem.objectives]
        study = _study(backend, where, name, directions)
        # Trials first: a process that opens the study at this moment writes its description before them.
        is_empty = not study.get_trials(deepcopy=False)
        description = problem.description()
        if "lightning_nas" not in study.user_attrs:
            if not is_empty or [d.name.lower() for d in study.directions] != directions:
                raise StudyMismatchError(
                    f"search: the study {name!r} in {where} was not written by a search of this package. "
                    "Give another name or storage."
                )
            study.set_user_attr("lightning_nas", description)
        if differences := _differences(study.user_attrs["lightning_nas"], description):
            raise StudyMismatchError(
                f"search: the study {name!r} in {where} is of another search: {'; '.join(differences)}. "
                "Give another name or storage; the stored study is as it was."
            )
        record = cls(problem, study, where)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
            record._restore(trial)
        return record

    def __len__(self) -> int:
        return len(self.trials)

    @property
    def next_proposal(self) -> int:
        return max((trial.user_attrs["proposal"] + 1 for trial in self.trials), default=0)

    def add(self, proposal: Proposal, values: dict[str, float], failure: str | None = None) -> FrozenTrial:
        """Write down a finished evaluation; returns it as Optuna sees it."""
        notes = {"proposal": proposal.number, "sampler": proposal.notes, "measured": values}
        trial = self._trial(proposal.architecture, values, notes, failure)
        if self._study is not None:
            self._study.add_trial(trial)
        self._keep(trial, proposal.architecture, values, failure)
        return trial

    def _restore(self, stored: FrozenTrial) -> None:
        notes = stored.user_attrs
        if "proposal" not in notes:  # of a process that uses Optuna directly
            return
        architecture = self.problem.space.canonical(stored.params)
        if architecture.key in self.keys:  # two workers at the same moment: the first counts
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
        if failure is None:
            self.candidates.append(Candidate(architecture, values))
        else:
            self.failed.append(Failure(architecture, failure))


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Without Optuna's line about each study that is made."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _study(
    storage: str | BaseStorage, where: str, name: str, directions: Sequence[Literal["minimize", "maximize"]]
) -> optuna.Study:
    """The Optuna study of this name, made if need be.

    Optuna looks for each table of a database and then makes it: of several processes that do so at the same
    moment, some fail, so a failure is worth another try.
    """
    from sqlalchemy.exc import DBAPIError

    for longest in _WAITS:
        time.sleep(SystemRandom().uniform(0, longest))  # not the generator that the user may have seeded
        try:
            with quiet_optuna():
                return optuna.create_study(
                    storage=storage, study_name=name, directions=directions, load_if_exists=True
                )
        except (DBAPIError, StorageInternalError) as error:
            failure = error
    raise NASError(
        f"search: the study {name!r} could not be opened in {where}, in {len(_WAITS)} attempts: "
        f"{str(failure).splitlines()[0]}. Check the URL, that its folder exists and can be written to, and "
        "that no program keeps the database locked."
    ) from failure


def _storage(storage: str | Path | BaseStorage | None, name: str) -> tuple[str | BaseStorage, str]:
    """The Optuna storage, and how to call it in messages."""
    if not name:
        raise ValueError("search: name is what the study is found by again and cannot be empty.")
    if isinstance(storage, BaseStorage):
        return storage, type(storage).__name__
    if isinstance(storage, str) and "://" in storage:
        return storage, _without_password(storage)
    file_name = re.sub(r"[^\w.-]+", "-", name)
    path = Path("nas_studies") / f"{file_name}.log" if storage is None else Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path))
    if path.is_dir() or (path.exists() and path.read_bytes()[:1] not in (b"", b"{")):
        raise ValueError(
            f"search: storage {str(path)!r} is no journal file; a database is given by its URL, as "
            f"'sqlite:///{path}'."
        )
    if path.exists():
        _mend(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock)), str(path)


def _without_password(url: str) -> str:
    """The URL as messages show it."""
    return re.sub(r"(://[^:/@]*):[^/]*@", r"\1:***@", url)


def _mend(path: Path, lock: JournalFileOpenLock) -> None:
    """Cut off a last line that a crash left half written: appended to, it would spoil the whole journal."""
    lock.acquire()
    try:
        with path.open("rb+") as file:
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


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
