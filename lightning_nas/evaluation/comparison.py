"""A fair comparison of strategies: equal budgets, several seeds, random search beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.storages import BaseStorage
from tqdm.auto import tqdm

from lightning_nas._record import Proposal, Record
from lightning_nas.evaluation.fronts import hypervolume_curve
from lightning_nas.evaluation.intervals import difference_of_means
from lightning_nas.objectives import Bound, Maximize, Objective
from lightning_nas.problem import Problem
from lightning_nas.results import Candidate, SearchResult, keeps, losses
from lightning_nas.space import Architecture, SearchSpace
from lightning_nas.strategies import Random, Strategy
from lightning_nas.study import Evaluate, resolved, say_where, search

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """How well strategies did with how many evaluations, over several seeds.

    The quality of a run is the hypervolume of its front or, with one objective, its best value.

    Args:
        objectives: in the order given.
        seeds: of the runs.
        reference: the worst point of interest, by objective: from where the quality is counted.
        curves: strategy to the quality after each evaluation, ``(seeds, budget)``.
        results: strategy to what its searches found, one a seed.
        evaluated: how many distinct architectures were evaluated for all of it.
    """

    objectives: tuple[Objective, ...]
    seeds: tuple[int, ...]
    reference: dict[str, float]
    curves: dict[str, NDArray[np.float64]]
    results: dict[str, tuple[SearchResult, ...]]
    evaluated: int

    @property
    def quality(self) -> str:
        """``"hypervolume"``, or the name of the only objective."""
        return self.objectives[0].name if len(self.objectives) == 1 else "hypervolume"

    def to_dataframe(self) -> pd.DataFrame:
        """One row a strategy, seed and number of evaluations, with the quality reached by then."""
        import pandas as pd

        rows = [
            (strategy, seed, count, value)
            for strategy, curves in self.curves.items()
            for seed, curve in zip(self.seeds, curves.tolist(), strict=True)
            for count, value in enumerate(curve, 1)
        ]
        return pd.DataFrame(rows, columns=["strategy", "seed", "evaluations", self.quality])

    def summary(self, confidence: float = 0.95) -> pd.DataFrame:
        """One row a strategy: the quality at the end, and what random search says to it.

        Columns: ``median``, ``lower quartile`` and ``upper quartile`` over seeds; ``gain``, the mean by which
        it is better than random search (above 0 in both directions of an objective), within ``gain from`` and
        ``gain to``, Welch's interval; ``evaluations``, the median number after which a run has what random
        search has at the end in the (lower) median; infinite where half of the runs or more never have.

        Args:
            confidence: of the interval of the gain.
        """
        import pandas as pd

        random = self._gains["random"][:, -1]
        rows = {}
        for strategy, gains in self._gains.items():
            lower, median, upper = np.quantile(self.curves[strategy][:, -1], (0.25, 0.5, 0.75))
            row = {"median": median, "lower quartile": lower, "upper quartile": upper}
            if strategy != "random":
                gain = difference_of_means(gains[:, -1], random, confidence)
                row |= {"gain": gain.estimate, "gain from": gain.low, "gain to": gain.high}
            reached = gains >= np.quantile(random, 0.5, method="lower")
            counts = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, np.inf)
            row["evaluations"] = np.quantile(counts, 0.5, method="higher")  # no mean with an infinite one
            rows[strategy] = row
        quartiles, interval = ["median", "lower quartile", "upper quartile"], ["gain", "gain from", "gain to"]
        columns = [*quartiles, *interval, "evaluations"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("strategy")

    def to_markdown(self, confidence: float = 0.95) -> str:
        """The summary as a table, with what it was measured on."""
        summary = self.summary(confidence)
        budget = len(next(iter(self.curves.values()))[0])
        reference = ", ".join(f"{name} {value:.5g}" for name, value in self.reference.items())
        lines = [
            f"{self.quality} after {budget} evaluations, {len(self.seeds)} seeds; counted from {reference}. "
            f"{self.evaluated} distinct architectures were evaluated. Gain: over random search, with its "
            f"{100 * confidence:g} % interval. Evaluations: in the median, to what random search has at the "
            "end in the median.",
            "",
            f"| strategy | {' | '.join(summary.columns)} |",
            "| --- |" + " ---: |" * len(summary.columns),
        ]
        for strategy, row in summary.iterrows():
            cells = ["" if math.isnan(x) else f"{x:.5g}" for x in row]
            lines.append(f"| {strategy} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw each strategy's median over seeds against evaluations, within its quartiles.

        Args:
            path: a file to write, of a kind that matplotlib knows (``"comparison.png"``).
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for strategy, curves in self.curves.items():
            lower, median, upper = np.quantile(curves, (0.25, 0.5, 0.75), axis=0)
            counts = np.arange(1, len(median) + 1)
            color, style = ("0.5", "--") if strategy == "random" else (None, "-")
            (line,) = axes.plot(counts, median, label=strategy, color=color, linestyle=style)
            axes.fill_between(counts, lower, upper, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_xlabel("evaluations")
        single = len(self.objectives) == 1
        axes.set_ylabel(self.objectives[0].label if single else "hypervolume")
        axes.set_title(f"median and quartiles of {len(self.seeds)} seeds", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend()
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write ``comparison.csv``, ``comparison.md``, ``comparison.png`` into a folder, made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_dataframe().to_csv(folder / "comparison.csv", index=False)
        (folder / "comparison.md").write_text(self.to_markdown(), encoding="utf-8")
        self.plot(folder / "comparison.png")
        return folder

    def __repr__(self) -> str:
        return f"<Comparison: {self.quality} of {', '.join(self.curves)}; {len(self.seeds)} seeds>"

    @property
    def _gains(self) -> dict[str, NDArray[np.float64]]:
        """The curves with the sign that makes larger better."""
        falls = len(self.objectives) == 1 and not isinstance(self.objectives[0], Maximize)
        return {strategy: -curves if falls else curves for strategy, curves in self.curves.items()}


def compare(
    strategies: Sequence[str | Strategy] | Mapping[str, str | Strategy],
    space: SearchSpace,
    evaluate: Evaluate,
    objectives: Sequence[Objective],
    *,
    budget: int = 200,
    seeds: int | Iterable[int] = 10,
    constraints: Mapping[Any, Bound] | None = None,
    reference: Mapping[str, float] | None = None,
    storage: str | Path | BaseStorage | None = None,
    name: str = "comparison",
    folder: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Run each strategy with equal budgets and several seeds, and random search beside them as the yardstick.

    An architecture is evaluated once, whichever strategy or seed asks for it, and counts for each of them. So
    on a table the comparison is as fast as the strategies; with a real evaluation it costs less than its
    searches. Evaluations are in the storage as soon as they are made: a comparison that was stopped, or is
    called again with more seeds, strategies or budget, pays only for what is new.

    Args:
        strategies: names and instances, or labels to them; ``"random"`` is added where it is missing.
        space: the architectures to choose from.
        evaluate: as of :func:`lightning_nas.search`; its first answer for an architecture is taken for good.
        objectives: as of :func:`lightning_nas.search`.
        budget: evaluations of each run.
        seeds: how many, counted from 0, or which.
        constraints: as of :func:`lightning_nas.search`; what breaks one counts for nothing.
        reference: the worst point of interest, by objective; by default the worst value of each over all
            candidates of all runs, so that it moves with what is compared.
        storage: where evaluations are kept, as of :func:`lightning_nas.search`.
        name: of the study within the storage.
        folder: where ``comparison.csv``, ``comparison.md`` and ``comparison.png`` are written, if anywhere.
        progress: show a bar.

    Returns:
        Curves, tables and plot.

    Raises:
        ValueError: for no strategy, two of the same label, no seed, a reference that does not name exactly
            the objectives, and as :func:`lightning_nas.search`.
        TypeError: for a strategy of the wrong kind, and as :func:`lightning_nas.search`.
        StudyMismatchError: if the storage holds a study of this name with another space or other objectives.

    Example:
        >>> from lightning_nas.space import Choice
        >>> space = SearchSpace([Choice(f"layer{i}", tuple(range(6))) for i in range(4)])
        >>> def measure(arch):
        ...     return {"score": float(sum(arch.values()))}
        >>> settings = {"budget": 60, "seeds": 5, "storage": "memory", "progress": False}
        >>> compare(["evolution"], space, measure, [Maximize("score")], **settings)
        <Comparison: score of evolution, random; 5 seeds>
    """
    problem = Problem.checked(space, objectives, constraints)
    named = _named(strategies)
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise ValueError(f"compare: seeds must be at least one, each once and from 0 up, got {seeds!r}.")
    if budget < 1:
        raise ValueError(f"compare: budget is a number of evaluations and must be at least 1, got {budget}.")
    names = [objective.name for objective in problem.objectives]
    if reference is not None and set(reference) != set(names):
        raise ValueError(
            f"compare: the reference must name {', '.join(map(repr, names))}, got "
            f"{', '.join(map(repr, reference))}."
        )

    answers = _Answers(problem, evaluate, Record.opened(problem, storage, name))
    results: dict[str, list[SearchResult]] = {label: [] for label in named}
    evaluated: dict[str, list[list[Candidate]]] = {label: [] for label in named}
    with tqdm(total=len(named) * len(numbers) * budget, disable=not progress, desc="compare") as bar:
        for i, seed in enumerate(numbers, 1):
            for label, strategy in named.items():
                bar.set_description(f"compare: {label}, seed {i} of {len(numbers)}")
                counted = answers.begin(bar)
                result = search(
                    space, answers, problem.objectives, strategy=strategy, budget=budget, storage="memory",
                    name=f"{label}, seed {seed}", seed=seed, constraints=constraints, remeasure=0,
                    progress=False,
                )  # fmt: skip
                bar.update(budget - len(counted))
                results[label].append(result)
                evaluated[label].append(counted)

    signs = np.array([-1.0 if isinstance(o, Maximize) else 1.0 for o in problem.objectives])
    if reference is None:
        feasible = [c for of_strategy in results.values() for result in of_strategy for c in result.feasible]
        if not feasible:
            raise ValueError(
                "compare: no run found a candidate that keeps the constraints, so nothing can be compared. "
                "Widen them, or give a larger budget or a reference."
            )
        worst = losses(problem.objectives, feasible).max(axis=0)
    else:
        worst = signs * [reference[name] for name in names]
    comparison = Comparison(
        problem.objectives,
        numbers,
        dict(zip(names, (signs * worst).tolist(), strict=True)),
        {
            label: np.array([_curve(problem, counted, worst, budget) for counted in runs])
            for label, runs in evaluated.items()
        },
        {label: tuple(found) for label, found in results.items()},
        len({c.architecture for runs in evaluated.values() for counted in runs for c in counted}),
    )
    if folder is not None:
        comparison.save(folder)
    return comparison


class _Answers:
    """Evaluates each architecture once, keeps the answer in the record, and counts what one run asks for."""

    def __init__(self, problem: Problem, evaluate: Evaluate, record: Record) -> None:
        self.problem, self.evaluate, self.record = problem, evaluate, record
        self.known: dict[str, dict[str, float]] = {}
        for trial in record.trials:
            architecture = problem.space.canonical(trial.params)
            costs, measured = problem.costs_of(architecture), self._measured(trial.user_attrs["measured"])
            self.known[architecture.key] = problem.values(measured, costs)

    def begin(self, bar: Any) -> list[Candidate]:
        """A new run: what it will have asked for, in that order."""
        self.bar, self.counted = bar, list[Candidate]()  # bar: a tqdm, which has no types
        return self.counted

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        values = self.known.get(architecture.key)
        if values is None:
            values = self.known[architecture.key] = self._evaluated(architecture)
        self.counted.append(Candidate(architecture, values))
        self.bar.set_postfix(evaluated=len(self.record), refresh=False)
        self.bar.update()
        return self._measured(values)

    def _evaluated(self, architecture: Architecture) -> dict[str, float]:
        costs = self.problem.costs_of(architecture)
        try:
            measured = self.evaluate(architecture)
        except BaseException as error:
            say_where(error, "compare", architecture, self.record)
            raise
        values = self.problem.values(measured, costs)
        proposal = Proposal(architecture, costs, len(self.record), {})
        self.record.add(proposal, values, self.problem.fault(values))
        return values

    def _measured(self, values: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in values.items() if name not in self.problem.computed}


def _curve(
    problem: Problem, counted: Sequence[Candidate], worst: NDArray[np.float64], budget: int
) -> NDArray[np.float64]:
    """The quality after each evaluation, ``(budget,)``; what a search that ended early has, it keeps."""
    usable = [problem.fault(c.values) is None and keeps(problem.limits, c) for c in counted]
    rows = losses(problem.objectives, counted)
    rows[~np.array(usable)] = np.inf
    if len(problem.objectives) == 1:
        sign = -1.0 if isinstance(problem.objectives[0], Maximize) else 1.0
        curve = sign * np.minimum.accumulate(np.minimum(rows[:, 0], worst[0]))
    else:
        curve = hypervolume_curve(rows, worst)
    return np.pad(curve, (0, budget - len(curve)), mode="edge")


def _named(strategies: Sequence[str | Strategy] | Mapping[str, str | Strategy]) -> dict[str, Strategy]:
    """Strategies by label, random search among them."""
    if isinstance(strategies, Mapping):
        pairs = list(strategies.items())
    else:
        given = [strategies] if isinstance(strategies, str) else strategies
        pairs = [(strategy if isinstance(strategy, str) else repr(strategy), strategy) for strategy in given]
    if not pairs:
        raise ValueError("compare: at least one strategy is needed, as ['nsga2', 'tpe'].")
    labels = [label for label, _ in pairs]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"compare: each strategy once; given more than once: {', '.join(repeated)}.")
    named = {label: resolved(strategy) for label, strategy in pairs}
    for label, strategy in named.items():
        if getattr(strategy, "partial", False):
            raise ValueError(
                f"compare: {label!r} has candidates evaluated on shares of the data, and here whole "
                "evaluations are counted. Compare by nas.search(...).hypervolume(reference)."
            )
    if named.setdefault("random", Random()) != Random():
        raise ValueError(
            f"compare: 'random' is the label of random search, but it was given {named['random']!r}. "
            "Give that another label."
        )
    return named
