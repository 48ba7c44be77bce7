"""How much of the front that there is was found, and how soon."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_nas.results import hypervolume, non_dominated

__all__ = ["hypervolume_curve", "igd_plus"]


def igd_plus(losses: ArrayLike, front: ArrayLike) -> float:
    """The mean distance by which a point of the true front is missed, all columns to be minimised.

    ``mean over z in front of min over a in losses of |max(a - z, 0)|``: where a is better than z, nothing is
    missed. 0 for a set that holds the front; never more for a set with further points.

    Args:
        losses: ``(n, objectives)``, what was found; columns should be of like size.
        front: ``(m, objectives)``.

    Raises:
        ValueError: if one is empty, or their columns differ.

    Example:
        >>> igd_plus([[1.0, 2.0]], front=[[0.0, 2.0], [1.0, 1.0]])
        1.0

    Reference: Ishibuchi, Masuda, Tanigaki, Nojima, EMO 2015; computed by pymoo.
    """
    found, true = np.asarray(losses, dtype=np.float64), np.asarray(front, dtype=np.float64)
    if (
        found.ndim != 2
        or true.ndim != 2
        or not found.size
        or not true.size
        or found.shape[1] != true.shape[1]
    ):
        raise ValueError(
            "igd_plus: losses and front must be tables of at least one row and the same columns, got shapes "
            f"{found.shape} and {true.shape}."
        )
    from pymoo.indicators.igd_plus import IGDPlus

    return float(IGDPlus(true)(found))


def hypervolume_curve(losses: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """The hypervolume of the first row, of the first two, and so on.

    Args:
        losses: ``(n, objectives)`` in the order of evaluation, all to be minimised; rows that are not better
            than the reference everywhere count nothing.
        reference: ``(objectives,)``.

    Returns:
        ``(n,)``, never falling.

    Example:
        >>> hypervolume_curve(np.array([[1.0, 2.0], [3.0, 0.0], [2.0, 1.0]]), np.array([3.0, 3.0]))
        array([2., 2., 3.])
    """
    curve = np.zeros(len(losses))
    front, reached = np.empty((0, losses.shape[1])), 0.0
    for i, row in enumerate(losses):
        if (row < reference).all() and not (front <= row).all(axis=1).any():
            front = np.concatenate([front, row[None]])
            front = front[non_dominated(front)]
            reached = hypervolume(front, reference)
        curve[i] = reached
    return curve
