"""What a few seeds say: means with intervals, differences, improvement over the average architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = ["Interval", "difference_of_means", "mean_and_interval", "relative_improvement"]


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds that hold the truth with a stated confidence; unbounded from a single run.

    Example:
        >>> Interval(2.0, 1.5, 2.5).excludes(0.0)
        True
    """

    estimate: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside."""
        return not self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_and_interval(
    values: ArrayLike, confidence: float = 0.95, method: Literal["student", "bootstrap"] = "student"
) -> Interval:
    """The mean over runs, with its interval.

    Args:
        values: ``(n,)``, one a run.
        confidence: of the interval, in (0, 1).
        method: ``"student"``: exact for normal values; ``"bootstrap"``: percentiles of resampled means, which
            are too narrow below some ten runs.

    Raises:
        ValueError: for no values, values that are not finite, or an argument out of its range.

    Example:
        >>> print(mean_and_interval([1.0, 2.0, 3.0]))
        2 [-0.4841, 4.484]
    """
    group = _group("mean_and_interval", "values", values)
    _check_confidence("mean_and_interval", confidence)
    if method == "bootstrap":
        return _bootstrap((group,), lambda x, axis: x.mean(axis), confidence)
    if method != "student":
        raise ValueError(f"mean_and_interval: method must be 'student' or 'bootstrap', got {method!r}.")
    mean = float(group.mean())
    if len(group) < 2:
        return Interval(mean, -np.inf, np.inf)
    return _around(mean, float(stats.sem(group)), len(group) - 1, confidence)


def difference_of_means(values: ArrayLike, others: ArrayLike, confidence: float = 0.95) -> Interval:
    """How much larger the mean of the first group is, with Welch's interval.

    The groups may differ in size and in spread.

    Args:
        values: ``(n,)``, one a run.
        others: ``(m,)``, runs of the other group; not paired with the first.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: for an empty group, values that are not finite, or a confidence out of its range.

    Example:
        >>> difference_of_means([2.0, 2.0], [1.0, 1.0])
        Interval(estimate=1.0, low=1.0, high=1.0)

    Reference: Welch, Biometrika 1947.
    """
    first, second = (
        _group("difference_of_means", *named) for named in (("values", values), ("others", others))
    )
    _check_confidence("difference_of_means", confidence)
    difference = float(first.mean() - second.mean())
    if min(len(first), len(second)) < 2:
        return Interval(difference, -np.inf, np.inf)
    parts = np.array([group.var(ddof=1) / len(group) for group in (first, second)])
    degrees = np.array([len(first) - 1, len(second) - 1])
    if not parts.any():
        return Interval(difference, difference, difference)
    return _around(
        difference, np.sqrt(parts.sum()), parts.sum() ** 2 / (parts**2 / degrees).sum(), confidence
    )


def relative_improvement(searched: ArrayLike, random: ArrayLike, confidence: float = 0.95) -> Interval:
    """By how many percent the networks a search found are better than average ones of the same space.

    ``100 * (mean(searched) - mean(random)) / mean(random)``, with percentiles of both groups resampled. It is
    worth something if both were trained and measured alike, with one seed each; an error gives another
    number than an accuracy.

    Args:
        searched: ``(n,)`` accuracies, one a run of the search.
        random: ``(m,)`` accuracies of architectures drawn uniformly from the space.
        confidence: of the interval, in (0, 1); below some ten runs a group it is too narrow.

    Raises:
        ValueError: for an empty group, values that are not finite, a mean of the random group that is not
            above 0, or a confidence out of its range.

    Example:
        >>> relative_improvement([0.75, 0.75], [0.5, 0.5])
        Interval(estimate=50.0, low=50.0, high=50.0)

    Reference: Yang, Esperança, Carlucci, ICLR 2020, equation 1.
    """
    found, drawn = (
        _group("relative_improvement", *named) for named in (("searched", searched), ("random", random))
    )
    _check_confidence("relative_improvement", confidence)
    if drawn.mean() <= 0:
        raise ValueError(
            "relative_improvement: the mean of random must be above 0 to divide by, got "
            f"{drawn.mean():g}. Give accuracies, not losses or negative errors."
        )
    return _bootstrap(
        (found, drawn), lambda s, r, axis: 100 * (s.mean(axis) - r.mean(axis)) / r.mean(axis), confidence
    )


def _bootstrap(
    groups: tuple[NDArray[np.float64], ...], statistic: Callable[..., Any], confidence: float
) -> Interval:
    estimate = float(statistic(*groups, axis=0))
    if min(map(len, groups)) < 2:
        return Interval(estimate, -np.inf, np.inf)
    bounds = stats.bootstrap(
        groups, statistic, confidence_level=confidence, method="percentile", vectorized=True, rng=0
    ).confidence_interval
    return Interval(estimate, float(bounds.low), float(bounds.high))


def _around(estimate: float, error: float, degrees: float, confidence: float) -> Interval:
    half = float(stats.t.ppf((1 + confidence) / 2, degrees)) * error
    return Interval(estimate, estimate - half, estimate + half)


def _group(where: str, name: str, values: ArrayLike) -> NDArray[np.float64]:
    group = np.asarray(values, dtype=np.float64)
    if group.ndim != 1 or not len(group):
        raise ValueError(
            f"{where}: {name} must be a list with one number a run, at least one, got shape {group.shape}."
        )
    if not np.isfinite(group).all():
        raise ValueError(
            f"{where}: {name} must be finite, got {group[~np.isfinite(group)][0]}. Leave failed runs out, "
            "and say how many there were."
        )
    return group


def _check_confidence(where: str, confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"{where}: confidence must be between 0 and 1, as 0.95, got {confidence}.")
