"""What a search found: candidates, failures, front, tables and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_nas.objectives import Bound, Limit, Maximize, Minimize, Objective
from lightning_nas.registry import nearest
from lightning_nas.space import Architecture, SearchSpace

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_nas.honesty import Noise

__all__ = ["Candidate", "Failure", "SearchResult", "hypervolume", "keeps", "losses", "non_dominated"]


@dataclass(frozen=True)
class Candidate:
    """An architecture with its values: the costs known beforehand and what was measured.

    Args:
        architecture: what was evaluated.
        values: by name, as measured first.
        origin: ``"start"`` if the strategy drew it at random before it had learnt anything, ``"strategy"`` if
            it chose it, ``"initial"`` if the user did, ``"space"`` if the strategy only repeated itself.
        predicted: what the strategy expected of values before they were measured.
        repeats: all values, once for each time that it was measured again.
    """

    architecture: Architecture
    values: dict[str, float]
    origin: str = field(default="", compare=False, repr=False)
    predicted: dict[str, float] = field(default_factory=dict, compare=False, repr=False)
    repeats: tuple[dict[str, float], ...] = field(default=(), compare=False, repr=False)

    @property
    def repeated(self) -> list[Candidate]:
        """A candidate for each later measurement, with its values."""
        return [Candidate(self.architecture, values) for values in self.repeats]

    @property
    def mean_of_repeats(self) -> Candidate:
        """A candidate with the mean of all later measurements."""
        later = self.repeats
        return Candidate(self.architecture, {n: sum(v[n] for v in later) / len(later) for n in later[0]})


@dataclass(frozen=True)
class Failure:
    """An architecture whose evaluation gave no usable value, and why."""

    architecture: Architecture
    reason: str


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        space: that was searched.
        objectives: in the order given to the search.
        candidates: everything that was evaluated, in that order.
        limits: the constraints of the search; a candidate that breaks one is never on the front.
        failed: what was evaluated in vain.
        duplicates: how many proposals were answered from the study, in this run.
        rejected: how many proposals broke a constraint before evaluation, in this run.
        reference: the candidate that plots star; by default the largest architecture, if it was evaluated.
        baseline: random search with the same budget, if it was asked for.
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    candidates: tuple[Candidate, ...]
    limits: tuple[Limit, ...] = ()
    failed: tuple[Failure, ...] = ()
    duplicates: int = 0
    rejected: int = 0
    reference: Candidate | None = None
    baseline: SearchResult | None = None

    @cached_property
    def front(self) -> tuple[Candidate, ...]:
        """The non-dominated candidates that keep every constraint, by ascending cost.

        *Cost* is the first objective that is a cost, else the first to be minimised, else the first.
        Candidates with equal values are all kept.
        """
        feasible = self.feasible
        best = [c for c, kept in zip(feasible, non_dominated(self._losses(feasible)), strict=True) if kept]
        order = [self._axis, *(o for o in self.objectives if o is not self._axis)]
        return tuple(sorted(best, key=lambda c: [_loss(o, c) for o in order]))

    @property
    def feasible(self) -> tuple[Candidate, ...]:
        """The candidates that keep every constraint of the search."""
        return tuple(c for c in self.candidates if keeps(self.limits, c))

    @property
    def random_start(self) -> tuple[Candidate, ...]:
        """The candidates that the strategy drew at random before it had learnt anything."""
        return tuple(c for c in self.candidates if c.origin == "start")

    @property
    def doubtful(self) -> tuple[Candidate, ...]:
        """The front's members that another one dominates when both are measured again.

        They stay on the front, which is made of first measurements: of every candidate there is one.
        """
        from lightning_nas import honesty  # which imports this

        return honesty.doubtful(self)

    def noise(self) -> dict[str, Noise]:
        """The noise of each objective and the winner's curse, from the front measured again, by name."""
        from lightning_nas import honesty  # which imports this

        return honesty.noises(self)

    def predictor_quality(self) -> pd.DataFrame:
        """How well the strategy predicted values before they were measured: a row for each.

        Columns ``n``, ``kendall``, ``spearman`` and ``mae``; no row for a strategy that predicts nothing.
        """
        from lightning_nas import honesty  # which imports this

        return honesty.predictor_quality(self.candidates)

    def summary(self) -> str:
        """A few lines: what was found, its random start, random search, predictions, noise."""
        from lightning_nas import honesty  # which imports this

        return honesty.summary(self)

    def best(self, metric: str | Objective, where: Mapping[Any, Bound] | None = None) -> Candidate:
        """The best candidate in one quantity, among those that keep bounds on others.

        Args:
            metric: the name of an objective; or ``Maximize(name)``, ``Minimize(name)`` for any value
                measured.
            where: name or cost to ``(operator, bound)``, as ``{"macs": ("<=", 2e8)}``.

        Returns:
            The best one that also keeps the constraints of the search; among equals the cheapest.

        Raises:
            ValueError: for an unknown name, or if no candidate satisfies ``where``; names the nearest value.
        """
        directions = {o.name: o for o in self.objectives}
        if isinstance(metric, str):
            if metric not in directions:
                known = f"SearchResult.best: {metric!r} is not an objective. {nearest(metric, directions)}"
                raise ValueError(
                    f"{known} For another measured value say which way: Maximize(name), Minimize(name)."
                )
            metric = directions[metric]
        limits = Limit.all_of(where, "SearchResult.best")
        names = {name: None for c in self.candidates for name in c.values}
        for name in (metric.name, *(limit.name for limit in limits)):
            if names and name not in names:
                raise ValueError(f"SearchResult.best: no value is named {name!r}. {nearest(name, names)}")
        feasible = self.feasible
        if not feasible:
            missing = f", of {len(self.candidates)} none keeps {_and(self.limits)}" if self.candidates else ""
            raise ValueError(f"SearchResult.best: the search has no candidate{missing}.")
        kept = [c for c in feasible if keeps(limits, c)]
        if not kept:
            raise ValueError(
                f"SearchResult.best: none of {len(feasible)} candidates has {_and(limits)}. "
                f"Nearest: {_nearest_values(limits, feasible)}."
            )
        return min(kept, key=lambda c: (_loss(metric, c), _loss(self._axis, c)))

    def hypervolume(self, reference: Mapping[str, float] | Sequence[float] | None = None) -> float:
        """The volume that the front dominates, in the product of the objectives' units.

        Args:
            reference: the worst point of interest, in the objectives' own units: name to number, or numbers
                in the order of the objectives. By default the worst value of each over all candidates, so
                that it moves with the search: give one to compare searches.

        Raises:
            ValueError: if the reference does not name exactly the objectives.
        """
        if reference is None:
            return (
                hypervolume(losses := self._losses(self.feasible), losses.max(axis=0))
                if self.feasible
                else 0.0
            )
        names = [o.name for o in self.objectives]
        if not isinstance(reference, Mapping):
            if len(reference) != len(names):
                raise ValueError(
                    f"SearchResult.hypervolume: {len(names)} objectives ({', '.join(names)}) need a "
                    f"reference of as many numbers, got {tuple(reference)}."
                )
            reference = dict(zip(names, reference, strict=True))
        if set(reference) != set(names):
            raise ValueError(
                f"SearchResult.hypervolume: the reference must name {', '.join(map(repr, names))}, "
                f"got {', '.join(map(repr, reference))}."
            )
        worst = np.array([_sign(o) * reference[o.name] for o in self.objectives])
        return hypervolume(self._losses(self.front), worst)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a candidate: its choices, its values, and whether it is on the front."""
        import pandas as pd

        front = {id(candidate) for candidate in self.front}
        rows = [{**c.architecture, **c.values, "front": id(c) in front} for c in self.candidates]
        columns = [*self.space.names, *dict.fromkeys(n for c in self.candidates for n in c.values), "front"]
        return pd.DataFrame(rows, columns=columns)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw all candidates, the front and the reference, one panel for each objective beside the cost.

        Where there are, also the front of the random start, that of random search, and bars of one standard
        deviation of a measurement at the front. With one objective: its values in the order of evaluation,
        and lines at the best of the random start and of random search.

        Args:
            path: a file to write, of a kind that matplotlib knows (``"front.png"``).
        """
        from matplotlib.figure import Figure

        across = self._axis
        up = [o for o in self.objectives if o is not across]
        figure = Figure(figsize=(1.0 + 5.0 * max(len(up), 1), 4.2), layout="constrained")
        for axes, objective in zip(
            figure.subplots(1, max(len(up), 1), squeeze=False)[0], up or [across], strict=True
        ):
            self._draw(axes, objective)
            axes.set_xlabel(across.label if up else "evaluation")
            axes.set_ylabel(objective.label)
            axes.grid(alpha=0.3)
            axes.legend()
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _draw(self, axes: Axes, objective: Objective) -> None:
        across, several = self._axis, len(self.objectives) > 1
        order = {id(c): i + 1 for i, c in enumerate(self.candidates)}

        def points(shown: Sequence[Candidate]) -> tuple[list[float], list[float]]:
            x = [c.values[across.name] if several else float(order.get(id(c), 0)) for c in shown]
            return x, [c.values[objective.name] for c in shown]

        axes.plot(*points(self.candidates), "o", color="0.75", markersize=4, label="candidates")
        beside: list[tuple[str, str, tuple[Candidate, ...]]] = []
        if 0 < len(self.random_start) < len(self.candidates):
            beside.append(("random start", ":", replace(self, candidates=self.random_start).front))
        if self.baseline is not None:
            beside.append(("random search", "--", self.baseline.front))
        joined = len(self.objectives) == 2
        for label, style, front in beside:
            if several:
                axes.plot(*points(front), style if joined else "x", color="0.4", linewidth=1, label=label)
            elif front:
                best = front[0].values[objective.name]
                axes.axhline(best, linestyle=style, color="0.4", linewidth=1, label=label)
        axes.plot(*points(self.front), "o-" if joined else "o", color="C0", markersize=5, label="front")
        noise = self.noise()
        if any(noise[o.name].deviation > 0 for o in (objective, across) if noise):
            across_too = noise[across.name].deviation if several else None
            x, y = points(self.front)
            axes.errorbar(
                x, y, noise[objective.name].deviation, across_too, fmt="none", ecolor="C0", label="noise"
            )
        if self.reference is not None:
            axes.plot(*points([self.reference]), "*", color="C3", markersize=14, label="reference")

    def save(self, folder: str | Path) -> Path:
        """Write ``candidates.csv``, ``result.json``, ``summary.txt`` and ``front.png`` into a folder.

        It is made if need be.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_dataframe().to_csv(folder / "candidates.csv", index=False)
        (folder / "result.json").write_text(json.dumps(self._to_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / "summary.txt").write_text(self.summary() + "\n", encoding="utf-8")
        self.plot(folder / "front.png")
        return folder

    def _to_dict(self) -> dict[str, Any]:
        front = {id(candidate) for candidate in self.front}
        return {
            "objectives": [
                {"name": o.name, "direction": o.direction, "unit": o.unit} for o in self.objectives
            ],
            "constraints": {limit.name: [limit.operator, limit.bound] for limit in self.limits},
            "hypervolume": self.hypervolume(),
            "candidates": [
                {
                    "architecture": dict(c.architecture),
                    "values": _plain(c.values),
                    "front": id(c) in front,
                    "origin": c.origin,
                    "predicted": _plain(c.predicted),
                    "repeats": [_plain(values) for values in c.repeats],
                }
                for c in self.candidates
            ],
            "failed": [{"architecture": dict(f.architecture), "reason": f.reason} for f in self.failed],
            "space": json.loads(self.space.to_json()),
            **({} if self.baseline is None else {"baseline": self.baseline._to_dict()}),
        }

    @property
    def _axis(self) -> Objective:
        costs = [o for o in self.objectives if o.is_cost]
        return [*costs, *(o for o in self.objectives if isinstance(o, Minimize)), *self.objectives][0]

    def _losses(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        return losses(self.objectives, candidates)

    def __repr__(self) -> str:
        names = ", ".join(f"{o.direction} {o.name}" for o in self.objectives)
        return f"<SearchResult: {names}; {len(self.candidates)} candidates, {len(self.front)} on the front>"


def keeps(limits: Iterable[Limit], candidate: Candidate) -> bool:
    """Whether a candidate keeps all limits; a value that it lacks keeps none."""
    return all(limit.holds(candidate.values.get(limit.name, math.nan)) for limit in limits)


def losses(objectives: Sequence[Objective], candidates: Sequence[Candidate]) -> NDArray[np.float64]:
    """The objectives' values with the sign that makes smaller better, ``(candidates, objectives)``."""
    rows = [[_loss(o, c) for o in objectives] for c in candidates]
    return np.array(rows, dtype=np.float64).reshape(len(candidates), len(objectives))


def non_dominated(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows no other row dominates, all columns to be minimised.

    A row dominates another when it is nowhere worse and somewhere better; equal rows are all kept.

    Args:
        losses: ``(n, objectives)``.

    Returns:
        ``(n,)``.
    """
    kept = np.ones(len(losses), dtype=np.bool_)
    for i in np.argsort(
        losses.sum(axis=1), kind="stable"
    ):  # a row near the origin clears many others at once
        if kept[i]:
            kept &= ~((losses >= losses[i]).all(axis=1) & (losses > losses[i]).any(axis=1))
    return kept


def hypervolume(losses: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """The volume between a set of points and a reference that they dominate, all columns minimised.

    Args:
        losses: ``(n, objectives)``; points that are not better than the reference everywhere count nothing.
        reference: ``(objectives,)``.

    Reference:
        Zitzler and Thiele 1998; computed by pymoo.
    """
    inside = losses[(losses < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    from pymoo.indicators.hv import HV

    return float(HV(ref_point=reference)(inside))


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    """As JSON may have it."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _loss(objective: Objective, candidate: Candidate) -> float:
    return _sign(objective) * candidate.values[objective.name]


def _sign(objective: Objective) -> int:
    return -1 if isinstance(objective, Maximize) else 1


def _and(limits: Sequence[Limit]) -> str:
    return " and ".join(map(str, limits))


def _nearest_values(limits: Sequence[Limit], candidates: Sequence[Candidate]) -> str:
    parts = []
    for limit in limits:
        found = [c.values[limit.name] for c in candidates if limit.name in c.values]
        parts.append(
            f"{limit.name} = {min(found, key=limit.excess):g}" if found else f"{limit.name} unmeasured"
        )
    return ", ".join(parts)
