"""Measures of searches and of predictions: fronts, ranks, intervals. `compare` is in :mod:`.comparison`."""

from lightning_nas.evaluation.fronts import hypervolume_curve, igd_plus
from lightning_nas.evaluation.intervals import (
    Interval,
    difference_of_means,
    mean_and_interval,
    relative_improvement,
)
from lightning_nas.evaluation.ranking import expected_best_of, kendall_tau, precision_at, regret, spearman
from lightning_nas.results import hypervolume, non_dominated

__all__ = [
    "Interval",
    "difference_of_means",
    "expected_best_of",
    "hypervolume",
    "hypervolume_curve",
    "igd_plus",
    "kendall_tau",
    "mean_and_interval",
    "non_dominated",
    "precision_at",
    "regret",
    "relative_improvement",
    "spearman",
]
