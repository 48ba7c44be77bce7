"""How well predictions order architectures, and what luck alone would find."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import gammaln

__all__ = ["expected_best_of", "kendall_tau", "precision_at", "regret", "spearman"]


def kendall_tau(predicted: ArrayLike, values: ArrayLike) -> float:
    """Kendall's rank correlation (tau-b), in [-1, 1]; nan where one side is constant.

    Args:
        predicted: ``(n,)``, n at least 2.
        values: ``(n,)``, the truth.

    Raises:
        ValueError: for lengths that differ or are below 2, or numbers that are not finite.

    Example:
        >>> round(kendall_tau([1, 2, 3], [10, 30, 20]), 4)
        0.3333

    Reference: Kendall 1945; computed by scipy.
    """
    return float(stats.kendalltau(*_pair("kendall_tau", predicted, values)).statistic)


def spearman(predicted: ArrayLike, values: ArrayLike) -> float:
    """Spearman's rank correlation, in [-1, 1]; nan where one side is constant.

    Args:
        predicted: ``(n,)``, n at least 2.
        values: ``(n,)``, the truth.

    Raises:
        ValueError: for lengths that differ or are below 2, or numbers that are not finite.

    Example:
        >>> spearman([1, 2, 3], [10, 30, 20])
        0.5

    Reference: Spearman 1904; computed by scipy.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(*_pair("spearman", predicted, values)).statistic)


def precision_at(k: int, predicted: ArrayLike, values: ArrayLike) -> float:
    """The share of the k best predicted that are among the k best; larger is better in both.

    Equal predictions count as put in a random order: it is the expectation.

    Args:
        k: from 1 to n.
        predicted: ``(n,)``, n at least 2.
        values: ``(n,)``, the truth; what equals the k-th best is among them.

    Raises:
        ValueError: as :func:`kendall_tau`, and for k out of its range.

    Example:
        >>> precision_at(2, [0.9, 0.8, 0.1], [10, 30, 20])
        0.5
    """
    guess, truth = _pair("precision_at", predicted, values)
    above, tied, drawn = _first("precision_at", k, guess)
    is_best = truth >= np.sort(truth)[-k]
    return float((is_best[above].sum() + drawn * is_best[tied].mean()) / k)


def regret(k: int, predicted: ArrayLike, values: ArrayLike) -> float:
    """By how much the best of the k best predicted falls short of the best; larger is better in both.

    Equal predictions count as put in a random order: it is the expectation.

    Args:
        k: from 1 to n.
        predicted: ``(n,)``, n at least 2.
        values: ``(n,)``, the truth.

    Raises:
        ValueError: as :func:`kendall_tau`, and for k out of its range.

    Example:
        >>> regret(2, [0.9, 0.1, 0.8], [10, 30, 25])
        5.0
    """
    guess, truth = _pair("regret", predicted, values)
    above, tied, drawn = _first("regret", k, guess)
    sure = truth[above].max(initial=-np.inf)
    return float(truth.max() - expected_best_of(drawn, np.maximum(truth[tied], sure)))


def expected_best_of(n: int, values: ArrayLike, *, replacement: bool = False) -> float:
    """The mean of the largest of n values drawn at random from a table: what random search finds.

    With the table in ascending order, the i-th value is the largest with probability
    ``C(i-1, n-1) / C(N, n)``, or with replacement ``(i/N)^n - ((i-1)/N)^n``. Exact, no simulation.

    Args:
        n: draws, at least 1; without replacement at most as many as there are values.
        values: ``(N,)``, larger is better: give an error negative.
        replacement: whether a value can be drawn again.

    Raises:
        ValueError: for n out of its range, or values that are missing or not finite.

    Example:
        >>> round(expected_best_of(2, [1.0, 2.0, 3.0]), 4)  # of three pairs two hold the 3
        2.6667
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64).ravel())
    size = len(ordered)
    if not size or not np.isfinite(ordered).all():
        raise ValueError("expected_best_of: values must be at least one number, all finite.")
    if n < 1 or (n > size and not replacement):
        raise ValueError(
            f"expected_best_of: n must be at least 1 and, without replacement, at most the {size} values, "
            f"got {n}."
        )
    i = np.arange(1, size + 1)
    if replacement:
        chance = (i / size) ** n - ((i - 1) / size) ** n
    else:
        chance = np.exp(_log_choose(i - 1, n - 1) - _log_choose(np.array(size), n))
    return float(chance @ ordered / chance.sum())


def _log_choose(of: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    ways: NDArray[np.float64] = gammaln(of + 1) - gammaln(k + 1) - gammaln(of - k + 1)
    return ways  # minus infinity where k is more than there are


def _pair(
    where: str, predicted: ArrayLike, values: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    guess, truth = (np.asarray(side, dtype=np.float64) for side in (predicted, values))
    if guess.ndim != 1 or guess.shape != truth.shape or len(guess) < 2:
        raise ValueError(
            f"{where}: predicted and values must be two lists of the same length, at least 2, got shapes "
            f"{guess.shape} and {truth.shape}."
        )
    if not (np.isfinite(guess).all() and np.isfinite(truth).all()):
        raise ValueError(f"{where}: predicted and values must be finite; leave the others out of both.")
    return guess, truth


def _first(
    where: str, k: int, guess: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], int]:
    """The rows surely among the k best predicted, those that share the last places, and these places."""
    if not 1 <= k <= len(guess):
        raise ValueError(f"{where}: k must be from 1 to the number of values, {len(guess)}, got {k}.")
    last = np.sort(guess)[-k]
    above = guess > last
    return above, guess == last, k - int(above.sum())
