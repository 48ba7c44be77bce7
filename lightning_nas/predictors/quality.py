"""How good a predictor is: of order, of size, of choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_nas.evaluation import kendall_tau, regret, spearman
from lightning_nas.predictors._predictor import Predictor

__all__ = ["Quality", "cross_validated", "quality_of"]


@dataclass(frozen=True)
class Quality:
    """Measures of predictions against what was measured.

    Args:
        kendall: Kendall's tau-b, in [-1, 1]; nan where one side is constant.
        spearman: Spearman's rank correlation, in [-1, 1]; nan where one side is constant.
        mae: mean absolute error, in the unit of the targets.
        regret: by how much the best of the architectures predicted to be the top ones falls behind the best.
        count: rows that were predicted.
    """

    kendall: float
    spearman: float
    mae: float
    regret: float
    count: int


def quality_of(
    predicted: ArrayLike, measured: ArrayLike, *, top: int = 1, larger_is_better: bool = True
) -> Quality:
    """Measures of predictions.

    Args:
        predicted: ``(n,)``.
        measured: ``(n,)``.
        top: how many of the architectures predicted best are looked at for the regret.
        larger_is_better: whether the best is the largest.

    Raises:
        ValueError: for shapes that differ, fewer than two rows, or numbers that are not finite.

    Example:
        >>> quality_of([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]).regret
        10.0
    """
    sign = 1.0 if larger_is_better else -1.0
    guess, truth = sign * np.asarray(predicted, np.float64), sign * np.asarray(measured, np.float64)
    return Quality(
        kendall_tau(guess, truth),
        spearman(guess, truth),
        float(np.abs(guess - truth).mean()),
        regret(top, guess, truth),
        len(truth),
    )


def cross_validated(
    make: Callable[[], Predictor],
    features: ArrayLike,
    targets: ArrayLike,
    *,
    folds: int = 5,
    seed: int = 0,
    larger_is_better: bool = True,
) -> Quality:
    """The quality of a kind of predictor: each row is predicted by one that was fitted without its fold.

    Args:
        make: gives a new predictor.
        features: ``(n, d)``.
        targets: ``(n,)``.
        folds: at least 2; with fewer rows each row is a fold.
        seed: of the folds.
        larger_is_better: see :func:`quality_of`.

    Raises:
        ValueError: for fewer than four rows.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if len(y) < 4:
        raise ValueError(f"cross_validated: at least 4 rows are needed, got {len(y)}.")
    order = np.random.default_rng(seed).permutation(len(y))
    predicted: NDArray[np.float64] = np.empty(len(y))
    for part in np.array_split(order, min(folds, len(y))):
        rest = np.setdiff1d(order, part)
        predicted[part] = make().fit(x[rest], y[rest]).predict(x[part]).mean
    return quality_of(predicted, y, larger_is_better=larger_is_better)
