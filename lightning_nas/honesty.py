"""What a search says about itself: its random start, its predictions, and its winners measured again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_nas.results import hypervolume, keeps, losses, non_dominated

if TYPE_CHECKING:
    import pandas as pd

    from lightning_nas.results import Candidate, SearchResult

__all__ = ["Noise", "doubtful", "noise_of", "noises", "predictor_quality", "reached", "summary"]


@dataclass(frozen=True)
class Noise:
    """How far measurements of one quantity can be trusted.

    Args:
        deviation: standard deviation of one measurement.
        bias: by how much the first measurements looked better than later ones: the winner's curse.
        bias_error: standard error of the bias; nan for one candidate.
        count: candidates that were measured again.
    """

    deviation: float
    bias: float
    bias_error: float
    count: int


def noise_of(first: Sequence[float], again: Sequence[Sequence[float]]) -> Noise:
    """The noise of measurements, from candidates that were measured again.

    With one repetition ``sqrt(sum d^2 / 2n)`` over the differences d. That counts the first measurement, by
    which the candidates were chosen: the winner's curse makes it too large. Where some candidate has two
    repetitions or more, it is the pooled standard deviation of the repetitions alone, which nobody chose.

    Args:
        first: ``(n,)``, the measurements by which the candidates were chosen, smaller being better.
        again: n sequences of at least one later measurement.

    Raises:
        ValueError: for no candidate, different lengths or a candidate without a repetition.

    Example:
        >>> noise_of([1.0, 2.0], [[2.0], [1.0]])
        Noise(deviation=0.7071067811865476, bias=0.0, bias_error=1.0, count=2)
    """
    if not first or len(first) != len(again) or not all(again):
        raise ValueError(
            "noise_of: each candidate needs its first measurement and at least one more, got "
            f"{len(first)} first ones and {[len(row) for row in again]} more."
        )
    gaps = np.array([np.mean(row) for row in again]) - np.asarray(first, np.float64)
    count = len(gaps)
    free = sum(len(row) - 1 for row in again)
    squares = sum(float(np.var(row)) * len(row) for row in again) if free else float((gaps**2).sum()) / 2
    return Noise(
        math.sqrt(squares / (free or count)),
        float(gaps.mean()),
        float(gaps.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan,
        count,
    )


def noises(result: SearchResult) -> dict[str, Noise]:
    """The noise of each objective, from the front's members that were measured again; empty if none was."""
    again = [c for c in result.front if c.repeats]
    if not again:
        return {}
    first = losses(result.objectives, again)
    later = [losses(result.objectives, c.repeated) for c in again]
    return {
        objective.name: noise_of(first[:, i].tolist(), [rows[:, i].tolist() for rows in later])
        for i, objective in enumerate(result.objectives)
    }


def doubtful(result: SearchResult) -> tuple[Candidate, ...]:
    """The front's members that another one dominates, or that break a constraint, by later measurements.

    Each counts with the mean of its repetitions, its first measurement being left out.
    """
    again = [c for c in result.front if c.repeats]
    means = [c.mean_of_repeats for c in again]
    kept = non_dominated(losses(result.objectives, means))
    return tuple(
        c for c, m, on in zip(again, means, kept, strict=True) if not on or not keeps(result.limits, m)
    )


def predictor_quality(candidates: Sequence[Candidate]) -> pd.DataFrame:
    """How well values were predicted before they were measured, a row for each.

    Only predictions that were written down when a candidate was proposed count: the predictor had never seen
    its measurement.

    Args:
        candidates: those without a prediction are left out.

    Returns:
        Columns ``n``, ``kendall``, ``spearman`` and ``mae``; nan where fewer than two were predicted.
    """
    import pandas as pd

    from lightning_nas.evaluation import kendall_tau, spearman  # which imports results

    rows = {}
    for name in dict.fromkeys(name for c in candidates for name in c.predicted):
        pairs = [(c.predicted[name], c.values[name]) for c in candidates if name in c.predicted]
        predicted, measured = np.array(pairs).T
        ranks = (f(predicted, measured) if len(pairs) > 1 else math.nan for f in (kendall_tau, spearman))
        rows[name] = (len(pairs), *ranks, float(np.abs(predicted - measured).mean()))
    columns = ["n", "kendall", "spearman", "mae"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).astype({"n": int})


def reached(result: SearchResult) -> dict[str, tuple[int, float]]:
    """How far the search came, its random start, and random search: candidates and quality, by name.

    The quality is the hypervolume, counted for all of them from the worst feasible value of each objective;
    with one objective its best value.
    """
    parts = {"this search": result.candidates}
    if 0 < len(result.random_start) < len(result.candidates):
        parts["its random start"] = result.random_start
    if result.baseline is not None:
        parts["random search"] = result.baseline.candidates
    rows = {
        name: losses(result.objectives, [c for c in part if keeps(result.limits, c)])
        for name, part in parts.items()
    }
    together = np.concatenate(list(rows.values()))
    if not len(together):
        return {name: (len(part), math.nan) for name, part in parts.items()}
    worst, sign = together.max(axis=0), -1.0 if result.objectives[0].direction == "maximize" else 1.0

    def quality(found: np.ndarray) -> float:
        if len(result.objectives) > 1:
            return hypervolume(found, worst)
        return sign * float(found.min()) if len(found) else math.nan

    return {name: (len(part), quality(rows[name])) for name, part in parts.items()}


def summary(result: SearchResult) -> str:
    """The search in a few lines of text: see :meth:`lightning_nas.SearchResult.summary`."""
    failed = f", {len(result.failed)} failed" if result.failed else ""
    lines = [f"{len(result.candidates)} candidates evaluated{failed}; {len(result.front)} on the front."]
    single = result.objectives[0].label if len(result.objectives) == 1 else ""
    lines += _table(
        (f"best {single}" if single else "hypervolume", "", "evaluations"),
        [(name, f"{value:.5g}", f"{count}") for name, (count, value) in reached(result).items()],
    )
    quality = predictor_quality(result.candidates)
    if len(quality):
        lines += _table(
            ("predicted before it was measured", "n", "Kendall", "Spearman", "MAE"),
            [
                (str(name), f"{int(row.n)}", f"{row.kendall:.3f}", f"{row.spearman:.3f}", f"{row.mae:.3g}")
                for name, row in quality.iterrows()
            ],
        )
    if found := noises(result):
        lines += _table(
            ("front measured again", "n", "noise", "first looked better by"),
            [
                (name, f"{n.count}", f"{n.deviation:.3g}", f"{n.bias:.3g} +- {n.bias_error:.2g}")
                for name, n in found.items()
            ],
        )
        lines += _verdict(result, found)
    return "\n".join(lines)


def _verdict(result: SearchResult, found: Mapping[str, Noise]) -> list[str]:
    again = next(iter(found.values())).count
    if not any(n.deviation or n.bias for n in found.values()):
        left = f"; the other {len(result.front) - again} were left out" if again < len(result.front) else ""
        return [f"Every value came out the same to the last bit{left}."]
    fallen = len(doubtful(result))
    return [f"{fallen} of {again} are dominated by others when measured again."] if fallen else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns, the first to the left and the others to the right, after an empty line."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "",
        *(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in (head, *rows)
        ),
    ]
