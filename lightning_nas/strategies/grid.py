"""Grid: every architecture once, in an order whose beginning is spread evenly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_nas.strategies._strategy import ProposingSampler, strategies

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from lightning_nas.problem import Problem
    from lightning_nas.space import SearchSpace, Value

__all__ = ["Grid", "grid_point"]


@strategies.register("grid")
@dataclass(frozen=True)
class Grid:
    """Goes through the whole space, in blocks in which each choice takes each of its values equally often.

    For spaces that can be evaluated completely, and where a fair picture of every single option is wanted
    early. The seed shuffles the order.

    Example:
        >>> strategies["grid"]()
        Grid()
    """

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """See :class:`~lightning_nas.strategies.Strategy`."""
        space = problem.space
        return ProposingSampler(space, seed, lambda study: grid_point(space, seed, proposal))


def grid_point(space: SearchSpace, seed: int, index: int) -> dict[str, Value]:
    """One point of the product of all choices, conditions aside; every point is given by one index.

    The indices are cut into blocks as long as the largest choice. Within a block each choice goes through a
    random permutation of its values (a Latin hypercube), again and again if it has fewer.

    Why every point comes once: the index is read as digits, one a choice, that of the largest choice running
    fastest. The value of choice i is digit i, shifted by an amount that depends on the digits before it
    alone; so these being known, value and digit determine each other.

    Args:
        space: to take it from.
        seed: of the permutations.
        index: counted modulo the number of points.

    Example:
        >>> from lightning_nas.space import Choice, SearchSpace
        >>> space = SearchSpace([Choice("a", (1, 2)), Choice("b", (1, 2, 3))])
        >>> len({tuple(grid_point(space, seed=0, index=index).values()) for index in range(6)})
        6

    Reference: McKay, Beckman, Conover, Technometrics 1979, for the Latin hypercube.
    """
    sizes = [len(choice.values) for choice in space]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    fastest, *others = order
    rest, position = divmod(index % math.prod(sizes), sizes[fastest])
    first = np.random.default_rng((seed, fastest)).permutation(sizes[fastest])[position]
    values = {fastest: int(first)}
    seen: list[int] = []
    for i in others:
        rest, digit = divmod(rest, sizes[i])
        shifts = np.random.default_rng((seed, i, *seen)).permutation(sizes[i])
        values[i] = int(shifts[position % sizes[i]] + digit) % sizes[i]
        seen.append(digit)
    return {choice.name: choice.values[values[i]] for i, choice in enumerate(space)}
