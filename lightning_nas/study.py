"""The search: ask a strategy for an architecture, evaluate it, write it down, tell the strategy."""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from optuna.storages import BaseStorage
from tqdm.auto import tqdm

from lightning_nas._proposals import Proposals
from lightning_nas._record import ROUNDING, Record
from lightning_nas._settings import SETTINGS, problem_of, settings_of, strategy_of
from lightning_nas._storage import Store, file_of, found
from lightning_nas.errors import NoMatchError, StorageError, StudyMismatchError
from lightning_nas.objectives import Bound, Cost, Objective, Scalarization
from lightning_nas.problem import Problem
from lightning_nas.results import Candidate, SearchResult, hypervolume, keeps, losses, non_dominated
from lightning_nas.sharing import Claims, Sharing
from lightning_nas.space import Architecture, SearchSpace, Value
from lightning_nas.strategies import Strategy, strategies

__all__ = ["Evaluate", "OnCandidate", "join", "resolved", "say_where", "search"]

Evaluate: TypeAlias = Callable[..., Mapping[str, float]]
"""``evaluate(architecture)``, or ``evaluate(architecture, share=...)`` where a strategy asks for a part."""
OnCandidate: TypeAlias = Callable[[Candidate, SearchResult], None]

_SHARING = Sharing()


def search(
    space: SearchSpace,
    evaluate: Evaluate,
    objectives: Sequence[Objective],
    *,
    strategy: str | Strategy = "linas",
    budget: int = 200,
    storage: str | Path | BaseStorage | None = None,
    name: str = "search",
    seed: int = 0,
    constraints: Mapping[Any, Bound] | None = None,
    initial: Iterable[Mapping[str, Value]] = (),
    baseline: bool = False,
    remeasure: int = 0,
    on_candidate: OnCandidate | None = None,
    progress: bool = True,
    sharing: Sharing = _SHARING,
) -> SearchResult:
    """Search a space for the architectures that trade the objectives best.

    Every finished candidate is in the storage before the next one begins, so a search that was killed, or
    whose ``evaluate`` raised, continues when called again: nothing finished is lost or evaluated twice, and
    with equal arguments the continued study is the uninterrupted one. A finished search returns at once; a
    larger budget extends it.

    Any number of processes and machines can share a study, by this call or by :func:`join`: together they
    evaluate ``budget`` architectures, none twice, and each returns the whole study. What a worker that died
    had begun, another begins again.

    The front of two architectures that share one network is one candidate: proposals are compared in
    canonical form, and one that is known is answered from the study. A value that is not finite makes a
    candidate fail, which is recorded, and the search goes on; an exception of ``evaluate`` ends it.

    Args:
        space: the architectures to choose from.
        evaluate: measures one architecture: ``evaluate(arch) -> {"accuracy": 0.9, ...}``. A strategy that
            wants less than the whole (``"successive-halving"``) calls ``evaluate(arch, share=1/9)``.
        objectives: at least one of ``Maximize(...)`` and ``Minimize(...)``; each names a value that
            ``evaluate`` returns, or is a cost, or a scalarization of both (``MnasNetReward``).
        strategy: a registered name (``"linas"``, ``"nsga2"``; all are in ``nas.strategies.strategies``) or an
            instance (``NSGA2(population=20)``).
        budget: evaluations of the whole study, failed ones and those of earlier calls included; one on a
            share of the data counts as that share.
        storage: an Optuna storage or its URL (``"sqlite:///search.db"``), the path of a journal file,
            ``"memory"`` for none; None: the journal file ``nas_studies/<name>.log``.
        name: of the study within the storage.
        seed: of the strategy; equal seeds give equal studies.
        constraints: name or cost to ``(operator, bound)``, as ``{macs: ("<=", 2e8)}``. A proposal that breaks
            one on a cost is rejected unevaluated and outside the budget; after 25 proposals in a row that
            are rejected or known, a space of up to 100,000 architectures is looked through completely, a
            larger one by 1,000 random draws, 50 walks towards the constraints, and beside what was found; if
            nothing turns up, the search ends. A candidate that breaks one on a measured value is kept, ranks
            behind all others for the strategy, and is never on the front.
        initial: architectures to evaluate first.
        baseline: also search at random, as ``result.baseline``: a second study ``<name>-random`` in the same
            storage, with the same budget, initial architectures and constraints and a seed of its own. It
            evaluates all its candidates itself, those that this search knows too.
        remeasure: how many times the front's members are evaluated again at the end, outside the budget, for
            the noise that the result states; 0 for none. Once two of them have come out the same to the last
            bit, evaluation is taken as deterministic, and only costs that are measured go on.
        on_candidate: called with each candidate finished in this call, and the result so far.
        progress: show a bar: evaluations, candidates a minute, time left, hypervolume, duplicates and
            rejected. Its hypervolume never falls: a cost's reference is the worse of the smallest and largest
            architecture, a measured value's the worst of the first ten candidates.
        sharing: how long other workers and a failing storage are waited for.

    Returns:
        All candidates, their front, tables and plots, and what they are worth.

    Raises:
        ValueError: for arguments that cannot work; a budget below what the study has spent; a value missing
            in what ``evaluate`` returns; constraints that nothing satisfies.
        TypeError: for an objective, a strategy or a measured value of the wrong kind.
        StudyMismatchError: if the storage holds a study of this name with another space or other objectives.
        StorageError: if the storage cannot be opened, or fails for longer than ``sharing.patience``; its
            ``.result`` is what was found, the last candidate included.

    Example:
        >>> from lightning_nas.objectives import Minimize
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
    problem = Problem.checked(space, objectives, constraints)
    strategy = resolved(strategy)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"search: budget is a number of evaluations and must be at least 1, got {budget!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"search: seed must be a whole number from 0 up, got {seed!r}.")
    if isinstance(remeasure, bool) or not isinstance(remeasure, int) or remeasure < 0:
        raise ValueError(f"search: remeasure is a number of times, 0 for none, got {remeasure!r}.")
    _check_share(strategy, evaluate)
    first = [space.canonical(architecture) for architecture in initial]

    record = Record.opened(problem, storage, name, sharing.patience)
    spent = math.ceil(record.spent - ROUNDING)
    if budget < spent:
        raise ValueError(
            f"search: budget is {budget}, but the study {name!r} in {record.where} has spent {spent} "
            f"evaluations already. Give a budget of at least {spent}, or another name or storage."
        )
    if record.store is not None:
        settings = settings_of(problem, strategy, budget, seed, remeasure)
        if record.store.attributes().get(SETTINGS) != settings:
            record.store.set(SETTINGS, settings)
    proposals = Proposals(problem, strategy, budget, seed, record, first)
    result = _searched(evaluate, proposals, name, remeasure, on_candidate, progress, sharing)
    if not baseline:
        return result
    random = search(
        space,
        evaluate,
        problem.objectives,
        strategy="random",
        budget=budget,
        storage=file_of(name) if storage is None else storage,
        name=f"{name}-random",
        seed=int(np.random.SeedSequence(seed).spawn(1)[0].generate_state(1)[0]),
        constraints=constraints,
        initial=first,
        remeasure=0,
        progress=progress,
        sharing=sharing,
    )
    return replace(result, baseline=random)


def join(
    evaluate: Evaluate,
    *,
    storage: str | Path | BaseStorage | None = None,
    name: str = "search",
    costs: Iterable[Cost | Scalarization] = (),
    strategy: str | Strategy | None = None,
    wait: float = 300.0,
    on_candidate: OnCandidate | None = None,
    progress: bool = True,
    sharing: Sharing = _SHARING,
) -> SearchResult:
    """Work on a search that another machine began: all that a further one calls.

    Space, objectives, constraints, strategy, budget and seed are read from the study. Random search beside it
    is a study of its own, ``<name>-random``.

    Args:
        evaluate: measures one architecture, as that of the search.
        storage: the one that :func:`search` was given.
        name: likewise.
        costs: the costs and scalarizations of the search, which cannot be stored. They are known by their
            names, and must count alike.
        strategy: in place of the stored one, where that is an object of a class without a registered name.
        wait: seconds to wait for a study that does not exist yet.
        on_candidate: called with each candidate finished in this call, and the result so far.
        progress: show a bar of the whole study.
        sharing: how long other workers and a failing storage are waited for.

    Returns:
        All candidates of the study, when its budget is spent.

    Raises:
        ValueError: for a search in memory.
        NoMatchError: if there is no such study after ``wait``, or costs are missing or unknown.
        StudyMismatchError: if the study was not written by :func:`search`, or its strategy cannot be made.
        StorageError: as :func:`search`.

    Example:
        >>> from lightning_nas.objectives import Maximize
        >>> from lightning_nas.space import Choice
        >>> from optuna.storages import InMemoryStorage
        >>> storage = InMemoryStorage()  # a URL or a file, for other processes
        >>> def measure(arch):
        ...     return {"accuracy": arch["width"] / 3}
        >>> settings = {"storage": storage, "name": "vit", "progress": False}
        >>> space = SearchSpace([Choice("width", (1, 2, 3))])
        >>> search(space, measure, [Maximize("accuracy")], budget=3, **settings)
        <SearchResult: maximize accuracy; 3 candidates, 1 on the front>
        >>> join(measure, **settings)
        <SearchResult: maximize accuracy; 3 candidates, 1 on the front>
    """
    where = f"the study {name!r}"
    store = _awaited(storage, name, wait, progress, sharing.patience)
    attributes = store.attributes()
    problem, settings = problem_of(attributes, costs, where), attributes[SETTINGS]
    own = strategy_of(settings, where) if strategy is None else resolved(strategy)
    record = Record.of(problem, store)
    _check_share(own, evaluate)
    budget = max(settings["budget"], math.ceil(record.spent - ROUNDING))
    proposals = Proposals(problem, own, budget, settings["seed"], record, ())
    remeasure = settings.get("remeasure", 0)
    return _searched(evaluate, proposals, name, remeasure, on_candidate, progress, sharing)


def _searched(
    evaluate: Evaluate,
    proposals: Proposals,
    name: str,
    remeasure: int,
    on_candidate: OnCandidate | None,
    progress: bool,
    sharing: Sharing,
) -> SearchResult:
    problem, record, budget = proposals.problem, proposals.record, proposals.budget

    def result() -> SearchResult:
        candidates = record.with_repeats()
        return SearchResult(
            problem.space,
            problem.objectives,
            candidates,
            limits=problem.limits,
            failed=tuple(record.failed),
            duplicates=proposals.duplicates,
            rejected=proposals.rejected,
            reference=next((c for c in candidates if c.architecture == problem.space.largest), None),
        )

    try:
        with Claims(record, sharing) as claims, _Progress(problem, record, budget, shown=progress) as bar:
            # Also a strategy that asks for shares of an evaluation stops where a whole one has no room.
            while budget - claims.look() >= 1 - ROUNDING:
                bar.update(proposals)
                proposal = proposals.next() if record.has_room(budget) else None
                if proposal is None and not record.others:
                    break
                if proposal is None:
                    claims.wait()
                elif claims.take(proposal, budget):
                    part = {} if proposal.share == 1 else {"share": proposal.share}
                    with _saying_where(name, proposal.architecture, record):
                        measured = evaluate(proposal.architecture, **part)
                    values = problem.values(measured, proposal.costs)
                    fault = problem.fault(values)
                    counts = claims.finish(proposal, values, fault, budget)
                    if counts and fault is None and not part and on_candidate is not None:
                        on_candidate(proposal.candidate(values), result())
            bar.update(proposals)
            _measure_again(evaluate, claims, result().front, remeasure, budget, name)
    except StorageError as error:
        if error.result is None:
            error.result = result()
        raise
    return result()


_CONVINCED = 2  # candidates that come out the same to the last bit before evaluation counts as deterministic


def _measure_again(
    evaluate: Evaluate, claims: Claims, front: Sequence[Candidate], times: int, budget: int, name: str
) -> None:
    """Evaluate the front's members, together with other workers, until each was so many times."""
    record, problem = claims.record, claims.record.problem
    noisy = {cost: of for cost, of in problem.costs.items() if cost not in problem.counted}

    def measured(values: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in values.items() if name not in problem.computed}

    def is_deterministic() -> bool:
        first = {c.architecture.key: measured(c.values) for c in record.candidates}
        again = [(first[key], measured(row)) for key, rows in record.repeats.items() for row in rows]
        return len(again) >= _CONVINCED and all(one == other for one, other in again)

    while times:
        claims.look()
        record.read_repeats()
        settled = is_deterministic()
        counts = [len(record.repeats.get(c.architecture.key, ())) for c in front]
        wanted = [(n, i) for i, n in enumerate(counts) if n < times]
        if not wanted or (settled and not noisy):
            return
        keys = {f"repeat {n}: {front[i].architecture.key}": (n, front[i]) for n, i in sorted(wanted)}
        free = [key for key in keys if key not in record.others]
        if not free:
            claims.wait()
        elif claims.take_key(free[0], record.next_proposal, 0.0, budget):
            count, candidate = keys[free[0]]
            record.read_repeats()  # what others finished before this claim stood
            if len(record.repeats.get(candidate.architecture.key, ())) > count:
                continue
            with _saying_where(name, candidate.architecture, record):
                values = measured(candidate.values) if settled else evaluate(candidate.architecture)
            costs = {cost: candidate.values[cost] for cost in problem.counted}
            costs |= problem.costs_of(candidate.architecture, noisy)
            record.repeat(candidate.architecture, problem.values(values, costs))


def _awaited(
    storage: str | Path | BaseStorage | None, name: str, wait: float, progress: bool, patience: float
) -> Store:
    """The study of this name with the settings of its search, as soon as it exists."""
    if storage == "memory":
        raise ValueError(
            "join: a search in memory cannot be joined; give it a storage that others can reach."
        )
    deadline, pause = time.monotonic() + wait, 0.25
    while True:
        try:
            store = found(storage, name, patience)
            is_begun = bool(store.trials())
            if SETTINGS in store.attributes():
                return store
            if is_begun:
                raise StudyMismatchError(
                    f"join: the study {name!r} in {store.where} does not say how it is searched: an earlier "
                    "version began it, or another program. Call search once more, with its arguments."
                )
        except NoMatchError:
            if time.monotonic() > deadline:
                raise
        if pause == 0.25 and progress:
            tqdm.write(f"join: waits up to {wait:g} s for the study {name!r}.", sys.stderr)
        time.sleep(pause)
        pause = min(2 * pause, 4.0)


class _Progress:
    """A bar with evaluations, candidates a minute, time left, hypervolume, duplicates and rejections."""

    _SETTLED = 10  # candidates whose worst measured values become the reference

    def __init__(self, problem: Problem, record: Record, budget: int, shown: bool) -> None:
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
            initial=int(record.spent),
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

    def update(self, proposals: Proposals) -> None:
        if self.bar.disable:
            return
        spent = round(self.record.spent, 1)
        fresh = (int(spent) if spent.is_integer() else spent) - self.bar.n
        shown = {"per min": f"{60 * (len(self.record) - self.start) / (time.monotonic() - self.began):.1f}"}
        if len(self.record.candidates) >= self._SETTLED:
            shown["hypervolume"] = f"{self._hypervolume():.5g}"
        shown.update(duplicates=str(proposals.duplicates), rejected=str(proposals.rejected))
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(fresh)

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


def resolved(strategy: str | Strategy) -> Strategy:
    """The strategy of a name, or the one given.

    Raises:
        ValueError: for an unknown name.
        TypeError: for what is no strategy.
    """
    if isinstance(strategy, str):
        return strategies[strategy]()
    if isinstance(strategy, type) or not callable(getattr(strategy, "sampler", None)):
        raise TypeError(
            f"search: strategy must be a registered name ({', '.join(strategies)}) or an instance with a "
            f"method sampler(...), as NSGA2(population=20), got {strategy!r}."
        )
    return strategy


def _check_share(strategy: Strategy, evaluate: Evaluate) -> None:
    """Refuse an evaluation that takes no share where the strategy asks for one."""
    if not getattr(strategy, "partial", False):
        return
    try:
        parameters = inspect.signature(evaluate).parameters
    except ValueError:  # of some functions written in C
        return
    if "share" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"search: {strategy!r} has candidates evaluated on a share of the data; evaluate must take it: "
            "def evaluate(architecture, share=1.0), with share in (0, 1]. Or take another strategy."
        )


@contextmanager
def _saying_where(name: str, architecture: Architecture, record: Record) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        say_where(error, f"search {name!r}", architecture, record)
        raise


def say_where(error: BaseException, where: str, architecture: Architecture, record: Record) -> None:
    """Add to an error of ``evaluate`` at which architecture it came, and what is not lost."""
    note = f"{where}: evaluate was stopped by this at {architecture!r}."
    if record.where != "memory":
        note += f" {len(record)} finished evaluations are kept in {record.where}; the same call continues "
        note += "from them."
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(note)
