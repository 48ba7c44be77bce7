"""Coarse-to-fine selection: first networks that are alike in all layers, then local changes of the best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from lightning_nas.results import non_dominated
from lightning_nas.strategies._strategy import ProposingSampler, losses_of, seeds, strategies, violation_of

if TYPE_CHECKING:
    from optuna.study import Study

    from lightning_nas.problem import Problem
    from lightning_nas.space import Choice, SearchSpace, Value

__all__ = ["CoarseToFine", "skeletons"]


@strategies.register("coarse-to-fine")
@dataclass(frozen=True)
class CoarseToFine:
    """Measures networks that are alike in all their layers, then changes the best of them layer by layer.

    The coarse phase proposes skeletons (see :func:`skeletons`). The fine phase takes a member of the front of
    all that was measured, any of them with the same probability, and moves each of its choices to the next
    smaller or larger value with probability ``mutation``, at least one of them.

    Args:
        coarse: how many skeletons are measured at most, at least 1; where there are more, some drawn at
            random, with the largest and the smallest one. None: a quarter of the budget, within 10 and 100.
        mutation: probability that a choice moves, in [0, 1]; None: one over the number of choices, or 0.1 if
            that is more.

    Raises:
        ValueError: for a value out of its range.

    Example:
        >>> CoarseToFine(coarse=40)
        CoarseToFine(coarse=40, mutation=None)

    Reference: Yu et al., BigNAS, ECCV 2020, section 3.4; there several budgets in place of a front.
    """

    coarse: int | None = None
    mutation: float | None = None

    def __post_init__(self) -> None:
        if self.coarse is not None and self.coarse < 1:
            raise ValueError(f"CoarseToFine: coarse must be at least 1, got {self.coarse}.")
        if self.mutation is not None and not 0 <= self.mutation <= 1:
            raise ValueError(
                f"CoarseToFine: mutation is a probability and must be in [0, 1], got {self.mutation}."
            )

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """See :class:`~lightning_nas.strategies.Strategy`."""
        space = problem.space
        count = min(100, max(10, budget // 4)) if self.coarse is None else self.coarse
        wanted = skeletons(space, count, np.random.default_rng(seeds(seed, 0, 1)[0]))
        rate = max(0.1, 1 / len(space)) if self.mutation is None else self.mutation
        own, draws = seeds(seed, proposal, 2)
        if proposal < len(wanted):
            return ProposingSampler(space, draws, lambda study: wanted[proposal])
        return ProposingSampler(space, draws, partial(_refined, space, rate, own))


def skeletons(space: SearchSpace, count: int, rng: np.random.Generator) -> list[dict[str, Value]]:
    """Networks in which all choices of a kind are at the same level.

    A kind is what names end in (``"layers.3.heads"``: ``heads``), without digits. It has as many levels as
    the longest of its choices has values; a shorter one takes the value nearest to that share of its range.

    Args:
        space: to take them from.
        count: at most so many, at least 1.
        rng: decides which, where there are more.

    Returns:
        Distinct networks as values by choice, the largest one and the smallest one first.

    Example:
        >>> from lightning_nas.space import Choice, SearchSpace
        >>> space = SearchSpace([Choice("0.heads", (1, 2)), Choice("1.heads", (2, 4))])
        >>> skeletons(space, 9, np.random.default_rng(0))
        [{'0.heads': 2, '1.heads': 4}, {'0.heads': 1, '1.heads': 2}]
    """
    kinds: dict[str, list[Choice]] = {}
    for choice in space:
        kinds.setdefault(choice.name.rpartition(".")[2].rstrip("0123456789"), []).append(choice)
    levels = {kind: max(len(choice.values) for choice in members) for kind, members in kinds.items()}

    def built(chosen: Sequence[int]) -> dict[str, Value]:
        level = dict(zip(kinds, chosen, strict=True))
        return {
            choice.name: choice.values[
                round(level[kind] / max(1, levels[kind] - 1) * (len(choice.values) - 1))
            ]
            for kind, members in kinds.items()
            for choice in members
        }

    whole = tuple(levels.values())
    ends = [tuple(size - 1 for size in whole), (0,) * len(whole)]
    if math.prod(whole) <= 100 * count:
        others = [point for point in itertools.product(*map(range, whole)) if point not in ends]
        rng.shuffle(others)
    else:
        others = [tuple(int(rng.integers(size)) for size in whole) for _ in range(4 * count)]
    distinct: dict[str, dict[str, Value]] = {}
    for point in dict.fromkeys((*ends, *map(tuple, others))):
        architecture = space.canonical(built(point))
        distinct.setdefault(architecture.key, dict(architecture))
    return list(distinct.values())[:count]


def _refined(space: SearchSpace, rate: float, seed: int, study: Study) -> dict[str, Value]:
    """A member of the front, with some of its choices moved to the value beside theirs."""
    # Not study.best_trials: it copies every trial, twice.
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    feasible = [trial for trial in complete if violation_of(trial) == 0]
    front = [feasible[i] for i in np.flatnonzero(non_dominated(losses_of(feasible, study.directions)))]
    if not front:
        return {}
    rng = np.random.default_rng(seed)
    start = space.canonical(front[rng.integers(len(front))].params)
    active = [choice for name in space.active(start) if len((choice := space[name]).values) > 1]
    moves = rng.random(len(active)) < rate
    if active and not moves.any():
        moves[rng.integers(len(active))] = True
    changed = dict(start)
    for choice, moved in zip(active, moves, strict=True):
        if moved:
            here = choice.values.index(start[choice.name])
            around = [i for i in (here - 1, here + 1) if 0 <= i < len(choice.values)]
            changed[choice.name] = choice.values[around[rng.integers(len(around))]]
    return changed
