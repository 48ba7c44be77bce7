"""The search: ask a strategy for an architecture, evaluate it, write it down, tell the strategy."""

from __future__ import annotations

import json
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from tqdm.auto import tqdm

from lightning_nas.errors import StudyMismatchError
from lightning_nas.registry import nearest
from lightning_nas.results import (
    Bound,
    Candidate,
    Cost,
    Failure,
    Limit,
    Maximize,
    Minimize,
    Objective,
    SearchResult,
    hypervolume,
    keeps,
    losses,
    non_dominated,
)
from lightning_nas.space import Architecture, SearchSpace, Value
from lightning_nas.strategies import Strategy, strategies

__all__ = ["Evaluate", "OnCandidate", "search"]

Evaluate: TypeAlias = Callable[[Architecture], Mapping[str, float]]
OnCandidate: TypeAlias = Callable[[Candidate, SearchResult], None]

_PATIENCE = 25  # proposals in a row that are known or rejected, after which the space itself is asked
_DRAWS = 1_000  # random architectures then tried
_ENUMERABLE = 100_000  # architectures up to which a space is then looked through one by one
_WALKS = (
    50  # in larger spaces: random starts from which the constraints are walked to, neighbour by neighbour
)


def search(
    space: SearchSpace,
    evaluate: Evaluate,
    objectives: Sequence[Objective],
    *,
    strategy: str | Strategy = "nsga2",
    budget: int = 200,
    storage: str | Path | BaseStorage | None = None,
    name: str = "search",
    seed: int = 0,
    constraints: Mapping[Any, Bound] | None = None,
    initial: Iterable[Mapping[str, Value]] = (),
    on_candidate: OnCandidate | None = None,
    progress: bool = True,
) -> SearchResult:
    """Search a space for the architectures that trade the objectives best.

    Every finished candidate is in the storage before the next one begins, so a search that was killed, or
    whose ``evaluate`` raised, continues when called again: nothing finished is lost or evaluated twice, and
    with equal arguments the continued study is the uninterrupted one. A finished search returns at once; a
    larger budget extends it.

    The front of two architectures that share one network is one candidate: proposals are compared in
    canonical form, and one that is known is answered from the study. A value that is not finite makes a
    candidate fail, which is recorded, and the search goes on; an exception of ``evaluate`` ends it.

    Args:
        space: the architectures to choose from.
        evaluate: measures one architecture: ``evaluate(arch) -> {"accuracy": 0.9, ...}``.
        objectives: at least one of ``Maximize(...)`` and ``Minimize(...)``; each names a value that
            ``evaluate`` returns, or is a cost.
        strategy: a registered name (``"nsga2"``, ``"random"``) or an instance (``NSGA2(population=20)``).
        budget: evaluations of the whole study, failed ones and those of earlier calls included.
        storage: an Optuna storage or its URL (``"sqlite:///search.db"``), the path of a journal file,
            ``"memory"`` for none; None: the journal file ``nas_studies/<name>.log``.
        name: of the study within the storage.
        seed: of the strategy; equal seeds give equal studies.
        constraints: name or cost to ``(operator, bound)``, as ``{macs: ("<=", 2e8)}``. A proposal that breaks
            one on a cost is rejected unevaluated and outside the budget; after 25 proposals in a row that
            are rejected or known, a space of up to 20,000 architectures is looked through completely, a
            larger one by 1,000 random draws, 50 walks towards the constraints, and beside what was found; if
            nothing turns up, the search ends. A candidate that breaks one on a measured value is kept, ranks
            behind all others for the strategy, and is never on the front.
        initial: architectures to evaluate first.
        on_candidate: called with each candidate finished in this call, and the result so far.
        progress: show a bar: evaluations, candidates a minute, time left, hypervolume, duplicates and
            rejected. Its hypervolume never falls: a cost's reference is the worse of the smallest and largest
            architecture, a measured value's the worst of the first ten candidates.

    Returns:
        All candidates, their front, tables and plots.

    Raises:
        ValueError: for arguments that cannot work; a value missing in what ``evaluate`` returns; constraints
            that nothing satisfies.
        TypeError: for an objective, a strategy or a measured value of the wrong kind.
        StudyMismatchError: if the storage holds a study of this name with another space or other objectives.

    Example:
        >>> from lightning_nas.space import Choice
        >>> space = SearchSpace([Choice("width", (1, 2, 3)), Choice("depth", (1, 2))])
        >>> def measure(arch):
        ...     width, depth = arch["width"], arch["depth"]
        ...     return {"error": 1 / (width * depth), "latency": width + 2 * depth}
        >>> objectives = [Minimize("error"), Minimize("latency", unit="ms")]
        >>> result = search(space, measure, objectives, storage="memory", progress=False)
        >>> len(result.candidates)
        6
        >>> result.best("error", where={"latency": ("<=", 5)}).architecture
        Architecture({'width': 3, 'depth': 1})
    """
    problem = _Problem.checked(space, objectives, constraints)
    strategy = _strategy(strategy)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"search: budget is a number of evaluations and must be at least 1, got {budget!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"search: seed must be a whole number from 0 up, got {seed!r}.")
    first = [space.canonical(architecture) for architecture in initial]

    record = _Record.opened(problem, storage, name)
    proposals = _Proposals(problem, strategy, budget, seed, record, first)

    def result() -> SearchResult:
        candidates = tuple(record.candidates)
        return SearchResult(
            space,
            problem.objectives,
            candidates,
            limits=problem.limits,
            failed=tuple(record.failed),
            duplicates=proposals.duplicates,
            rejected=proposals.rejected,
            reference=next((c for c in candidates if c.architecture == space.largest), None),
        )

    with _Progress(problem, record, budget, shown=progress) as bar:
        while len(record) < budget and (proposal := proposals.next()) is not None:
            try:
                measured = evaluate(proposal.architecture)
            except BaseException as error:
                _say_where(error, name, proposal.architecture, record)
                raise
            values = problem.values(measured, proposal.costs)
            unusable = [n for n in problem.needed if not math.isfinite(values[n])]
            if unusable:
                reason = ", ".join(f"{n} is {values[n]}" for n in unusable)
                proposals.told(record.add(proposal, values, reason))
            else:
                proposals.told(record.add(proposal, values))
                if on_candidate is not None:
                    on_candidate(record.candidates[-1], result())
            bar.update(proposals)
    return result()


@dataclass(frozen=True)
class _Problem:
    """What is searched for: what a stored study must share, and the constraints of this call."""

    space: SearchSpace
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    costs: dict[str, Cost]

    @classmethod
    def checked(
        cls, space: SearchSpace, objectives: Sequence[Objective], constraints: Mapping[Any, Bound] | None
    ) -> _Problem:
        objectives = tuple(objectives) if isinstance(objectives, Sequence) else (objectives,)
        if not objectives:
            raise ValueError(
                "search: at least one objective is needed, as [Maximize('accuracy'), Minimize(macs)]."
            )
        for objective in objectives:
            if not isinstance(objective, Maximize | Minimize):
                raise TypeError(f"search: an objective is Maximize(...) or Minimize(...), got {objective!r}.")
        names = [objective.name for objective in objectives]
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(
                f"search: each objective once; given more than once: {', '.join(map(repr, repeated))}."
            )
        limits = Limit.all_of(constraints, "search: constraints")
        costs: dict[str, Cost] = {}
        for quantity in (*(objective.quantity for objective in objectives), *(constraints or {})):
            if not isinstance(quantity, str) and costs.setdefault(quantity.name, quantity) is not quantity:
                raise ValueError(
                    f"search: two costs are named {quantity.name!r}; give the same one in both places."
                )
        for name in (*names, *(limit.name for limit in limits)):
            if name in space:
                raise ValueError(
                    f"search: {name!r} is a choice of the space and cannot also be a measured value."
                )
        return cls(space, objectives, limits, costs)

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """The values that every candidate must have."""
        return tuple(
            dict.fromkeys((*(o.name for o in self.objectives), *(limit.name for limit in self.limits)))
        )

    @cached_property
    def analytic(self) -> tuple[Limit, ...]:
        """The constraints that are decided before evaluation."""
        return tuple(limit for limit in self.limits if limit.name in self.costs)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {choice.name: CategoricalDistribution(choice.values) for choice in self.space}

    def costs_of(self, architecture: Architecture) -> dict[str, float]:
        return {name: float(cost(architecture)) for name, cost in self.costs.items()}

    def costs_of_all(self, architectures: Sequence[Architecture]) -> list[dict[str, float]]:
        """As :meth:`costs_of`, with each cost's own ``many`` where it has one."""
        rows: list[dict[str, float]] = [{} for _ in architectures]
        for name, cost in self.costs.items():
            many: Callable[[Sequence[Architecture]], Iterable[float]] | None = getattr(cost, "many", None)
            for row, value in zip(
                rows, many(architectures) if many else map(cost, architectures), strict=True
            ):
                row[name] = float(value)
        return rows

    def values(self, measured: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
        """All values of a candidate, in one mapping of plain floats."""
        if not isinstance(measured, Mapping):
            raise TypeError(
                "search: evaluate must return a mapping of names to numbers, as {'accuracy': 0.9}, "
                f"got {measured!r}."
            )
        for name in measured:
            if name in costs or name in self.space:
                taken = "a cost" if name in costs else "a choice of the space"
                raise ValueError(
                    f"search: evaluate returned {name!r}, which is also the name of {taken}; rename one."
                )
        for name in self.needed:
            if name not in measured and name not in costs:
                raise ValueError(f"search: evaluate returned no {name!r}. {nearest(name, measured)}")
        try:
            return {**costs, **{name: float(value) for name, value in measured.items()}}
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"search: evaluate must return plain numbers ({error}), got {measured!r}."
            ) from error

    def excess(self, costs: Mapping[str, float]) -> float:
        """How far costs are beyond their constraints, relative to the bounds; 0 if all are kept."""
        broken = [limit for limit in self.analytic if not limit.holds(costs[limit.name])]
        return sum(
            max(limit.excess(costs[limit.name]) / (abs(limit.bound) or 1.0), 1e-12) for limit in broken
        )

    def description(self) -> dict[str, Any]:
        """What is written into the study, to know it again."""
        return {
            "space": json.loads(self.space.to_json()),
            "objectives": [[objective.direction, objective.name] for objective in self.objectives],
        }


@dataclass(frozen=True)
class _Proposal:
    architecture: Architecture
    costs: dict[str, float]
    number: int  # how many were made before it
    notes: dict[str, Any]  # what the sampler wrote on its trial (NSGA-II: the generation)


class _Record:
    """The finished evaluations: an image of the stored Optuna study, written in one transaction each.

    Nothing unfinished is ever written, so a killed process leaves nothing to clean up: its last candidate was
    not begun as far as the study knows. Several workers can share a storage by reading, before each proposal,
    the trials that others added.
    """

    def __init__(self, problem: _Problem, study: optuna.Study | None, where: str) -> None:
        self.problem, self.where = problem, where
        self.candidates: list[Candidate] = []
        self.failed: list[Failure] = []
        self.trials: list[FrozenTrial] = []
        self.keys: set[str] = set()
        self._study = study

    @classmethod
    def opened(cls, problem: _Problem, storage: str | Path | BaseStorage | None, name: str) -> _Record:
        """The study of this name, made if need be, with what it holds.

        Raises:
            StudyMismatchError: if the stored study is another one.
        """
        if storage == "memory":
            return cls(problem, None, "memory")
        backend, where = _storage(storage, name)
        directions = [objective.direction for objective in problem.objectives]
        with _quiet_optuna():
            study = optuna.create_study(
                storage=backend, study_name=name, directions=directions, load_if_exists=True
            )
        description, stored = problem.description(), study.user_attrs.get("lightning_nas")
        if stored is None and (
            study.get_trials(deepcopy=False) or [d.name.lower() for d in study.directions] != directions
        ):
            raise StudyMismatchError(
                f"search: the study {name!r} in {where} was not written by a search of this package. "
                "Give another name or storage."
            )
        if stored is None:
            study.set_user_attr("lightning_nas", description)
        elif differences := _differences(stored, description):
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

    def add(self, proposal: _Proposal, values: dict[str, float], failure: str | None = None) -> FrozenTrial:
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
        self._keep(self._trial(architecture, values, notes, failure), architecture, values, failure)

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


class _Proposals:
    """Asks the strategy until it names an architecture that is unknown and keeps the constraints on costs.

    The sampler sees an Optuna study in memory that holds the recorded trials alone, in canonical form; what
    was asked and not recorded leaves no trace in it, and the generators of each proposal are seeded by its
    number.
    """

    def __init__(
        self,
        problem: _Problem,
        strategy: Strategy,
        budget: int,
        seed: int,
        record: _Record,
        initial: Sequence[Architecture],
    ) -> None:
        self.problem, self.strategy, self.record = problem, strategy, record
        self.budget, self.seed = budget, seed
        self.duplicates = self.rejected = 0
        self._number = record.next_proposal
        self._nearest: dict[str, float] | None = None
        self._initial = [a for a in dict.fromkeys(initial) if self._keeps(problem.costs_of(a))]
        with _quiet_optuna():
            directions = [objective.direction for objective in problem.objectives]
            self._study = optuna.create_study(directions=directions)
        self._study.add_trials(record.trials)

    def next(self) -> _Proposal | None:
        """The next architecture to evaluate; None when there is none left.

        Raises:
            ValueError: if nothing seen so far keeps the constraints.
        """
        space = self.problem.space
        for _ in range(_PATIENCE):
            if len(self.record) >= space.size:
                return None
            while self._initial and self._initial[0].key in self.record.keys:
                self._initial.pop(0)
            proposal = self._ask(self._initial.pop(0) if self._initial else None)
            if proposal.architecture.key in self.record.keys:
                self.duplicates += 1
            elif self._keeps(proposal.costs):
                return proposal
        unseen = self._unseen(np.random.default_rng((self.seed, self._number)))
        if unseen is not None:
            return self._ask(unseen)
        self._say_why_none_is_left()
        return None

    def told(self, trial: FrozenTrial) -> None:
        """Let the strategy see a finished evaluation."""
        self._study.add_trial(trial)

    def _ask(self, instead: Architecture | None) -> _Proposal:
        """What the strategy's sampler proposes, or a given architecture in its place."""
        self._study.sampler = self.strategy.sampler(self.problem.space, self.budget, self.seed, self._number)
        asked = self._study.tell(self._study.ask(self.problem.distributions), state=TrialState.FAIL)
        self._number += 1
        architecture = self.problem.space.canonical(asked.params) if instead is None else instead
        return _Proposal(
            architecture, self.problem.costs_of(architecture), self._number - 1, asked.system_attrs
        )

    def _keeps(self, costs: dict[str, float]) -> bool:
        excess = self.problem.excess(costs)
        if excess > 0:
            self.rejected += 1
            self._nearest = min(self._nearest or costs, costs, key=self.problem.excess)
        return excess <= 0

    def _is_wanted(self, architecture: Architecture) -> bool:
        return architecture.key not in self.record.keys and self._keeps(self.problem.costs_of(architecture))

    @cached_property
    def _feasible(self) -> dict[str, Architecture]:
        """Every architecture of a small space that keeps the constraints on costs, by key."""
        everything = list(self.problem.space.enumerate())
        costs = self.problem.costs_of_all(everything)
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
            unseen = [a for key, a in self._feasible.items() if key not in self.record.keys]
            return unseen[rng.integers(len(unseen))] if unseen else None
        draws = (space.sample(rng) for _ in range(_DRAWS))
        walks = (self._walk(space.sample(rng), rng) for _ in range(_WALKS))
        beside = (near for c in candidates for near in space.neighbours(c.architecture))
        return next(filter(self._is_wanted, chain(draws, walks, beside)), None)

    def _walk(self, architecture: Architecture, rng: np.random.Generator) -> Architecture:
        """Step to a neighbour that breaks the constraints less, until none does."""

        def excess(of: Architecture) -> float:
            return self.problem.excess(self.problem.costs_of(of))

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


class _Progress:
    """A bar with evaluations, candidates a minute, time left, hypervolume, duplicates and rejections."""

    _SETTLED = 10  # candidates whose worst measured values become the reference

    def __init__(self, problem: _Problem, record: _Record, budget: int, shown: bool) -> None:
        self.problem, self.record, self.start = problem, record, len(record)
        self.began = time.monotonic()
        self._reference: NDArray[np.float64] | None = None
        self._front = np.empty((0, len(problem.objectives)))
        self._read = 0  # candidates that the front has seen
        if shown and self.start:
            tqdm.write(
                f"search: continues from {self.start} evaluations found in {record.where}.", sys.stderr
            )
        self.bar = tqdm(
            total=budget,
            initial=self.start,
            disable=not shown,
            desc="search",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}{postfix}]",
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def update(self, proposals: _Proposals) -> None:
        if self.bar.disable:
            return
        shown = {"per min": f"{60 * (len(self.record) - self.start) / (time.monotonic() - self.began):.1f}"}
        if len(self.record.candidates) >= self._SETTLED:
            shown["hypervolume"] = f"{self._hypervolume():.5g}"
        shown.update(duplicates=str(proposals.duplicates), rejected=str(proposals.rejected))
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def _hypervolume(self) -> float:
        problem, candidates = self.problem, self.record.candidates
        if self._reference is None:
            self._reference = self._worst_of_interest(candidates[: self._SETTLED])
        fresh = [c for c in candidates[self._read :] if keeps(problem.limits, c)]
        self._read = len(candidates)
        points = np.concatenate([self._front, losses(problem.objectives, fresh)])
        self._front = points[non_dominated(points)]
        return hypervolume(self._front, self._reference)

    def _worst_of_interest(self, first: Sequence[Candidate]) -> NDArray[np.float64]:
        problem = self.problem
        ends = [problem.costs_of(a) for a in (problem.space.smallest, problem.space.largest)]
        known = [Candidate(c.architecture, {**c.values, **end}) for c in first for end in ends]
        return np.max(losses(problem.objectives, known), axis=0)  # type: ignore[no-any-return]  # numpy's stubs


def _strategy(strategy: str | Strategy) -> Strategy:
    if isinstance(strategy, str):
        return strategies[strategy]()
    if isinstance(strategy, type) or not callable(getattr(strategy, "sampler", None)):
        raise TypeError(
            f"search: strategy must be a registered name ({', '.join(strategies)}) or an instance with a "
            f"method sampler(...), as NSGA2(population=20), got {strategy!r}."
        )
    return strategy


def _storage(storage: str | Path | BaseStorage | None, name: str) -> tuple[str | BaseStorage, str]:
    """The Optuna storage, and how to call it in messages."""
    if not name:
        raise ValueError("search: name is what the study is found by again and cannot be empty.")
    if isinstance(storage, BaseStorage):
        return storage, type(storage).__name__
    if isinstance(storage, str) and "://" in storage:
        return storage, storage
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


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without Optuna's line about each study that is made."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


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


def _say_where(error: BaseException, name: str, architecture: Architecture, record: _Record) -> None:
    note = (
        f"search {name!r}: evaluate was stopped by this at {architecture!r}. {len(record)} finished "
        f"evaluations are kept in {record.where}"
        + ("." if record.where == "memory" else "; the same call continues from them.")
    )
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(note)
