"""Evolution where a candidate costs next to nothing: NSGA-II on integer rows, all of a generation at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Losses", "Rows", "evolve", "ranked", "spread", "unlike"]

Rows = NDArray[np.int64]
Losses = NDArray[np.float64]


def evolve(
    start: Rows,
    options: NDArray[np.int64],
    losses: Callable[[Rows], Losses],
    canonical: Callable[[Rows], Rows],
    generations: int,
    rng: np.random.Generator,
) -> tuple[Rows, Losses]:
    """Everything that an evolution meets.

    Parents meet in tournaments of rank and crowding; a choice comes from either parent, and is drawn
    anew with probability one over the number of choices. What was met before is not asked for again.

    Args:
        start: ``(population, choices)``, positions of options.
        options: ``(choices,)``, how many each choice has.
        losses: of rows, ``(n, objectives)``, all to be minimised.
        canonical: equal networks to equal rows.
        generations: how many follow the first.
        rng: of the operators.

    Returns:
        All distinct rows in the order they were met, and their losses.

    Reference: Deb, Pratap, Agarwal, Meyarivan, IEEE TEVC 2002.
    """
    rows = np.unique(canonical(start), axis=0)
    values = losses(rows)
    met = {row.tobytes() for row in rows}
    archive = [(rows, values)]
    population = len(rows)
    for _ in range(generations):
        order = ranked(values)
        place = np.empty(len(rows), dtype=np.int64)
        place[order] = np.arange(len(rows))
        parents = [np.minimum.reduce(place[rng.integers(len(rows), size=(2, population))]) for _ in range(2)]
        one, other = (rows[order[parent]] for parent in parents)
        children = np.where(rng.random(one.shape) < 0.5, one, other)
        drawn = (rng.random(children.shape) * options).astype(np.int64)
        children = np.where(rng.random(children.shape) < 1 / len(options), drawn, children)
        fresh = np.array([row for row in np.unique(canonical(children), axis=0) if row.tobytes() not in met])
        if not len(fresh):
            continue
        met.update(row.tobytes() for row in fresh)
        archive.append((fresh, losses(fresh)))
        rows, values = np.concatenate([rows, fresh]), np.concatenate([values, archive[-1][1]])
        kept = ranked(values)[:population]
        rows, values = rows[kept], values[kept]
    return np.concatenate([r for r, _ in archive]), np.concatenate([v for _, v in archive])


def ranked(losses: Losses) -> NDArray[np.int64]:
    """Positions of rows from best to worst: by front, and within a front the loneliest first."""
    from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    fronts = NonDominatedSorting().do(losses)
    return np.concatenate(
        [front[np.argsort(-calc_crowding_distance(losses[front]), kind="stable")] for front in fronts]
    )


def spread(losses: Losses, count: int, taken: Losses) -> list[int]:
    """As many rows as asked for, best fronts first, of the last one those farthest from what is taken.

    Args:
        losses: ``(n, objectives)``.
        count: how many, at most n.
        taken: ``(m, objectives)``, losses of what need not be met again.

    Returns:
        Positions of the rows.
    """
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    low, high = losses.min(0), losses.max(0)
    unit = np.where(high > low, high - low, 1.0)
    points, known = (losses - low) / unit, (taken - low) / unit
    distance = np.full(len(points), np.inf)
    for point in known:
        distance = np.minimum(distance, np.abs(points - point).sum(1))
    chosen: list[int] = []
    for front in NonDominatedSorting().do(losses, n_stop_if_ranked=count):
        left = list(front)
        while left and len(chosen) < count:
            farthest = max(left, key=lambda i: distance[i])
            left.remove(farthest)
            chosen.append(int(farthest))
            distance = np.minimum(distance, np.abs(points - points[farthest]).sum(1))
    return chosen


def unlike(rows: Rows, known: Rows, count: int) -> list[int]:
    """The rows that share fewest choices with any known one and with each other, one after the other.

    Args:
        rows: ``(n, choices)``, better ones first: of equals the first is taken.
        known: ``(m, choices)``.
        count: at most so many.

    Returns:
        Positions of the rows.
    """
    distance = np.full(len(rows), rows.shape[1] + 1)
    for row in known:
        distance = np.minimum(distance, (rows != row).sum(1))
    chosen: list[int] = []
    for _ in range(min(count, len(rows))):
        farthest = int(distance.argmax())
        chosen.append(farthest)
        distance = np.minimum(distance, (rows != rows[farthest]).sum(1))
        distance[farthest] = -1
    return chosen
