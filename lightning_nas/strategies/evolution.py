"""Regularised evolution: change one choice of a tournament's winner, and let the oldest member die."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from optuna.trial import TrialState

from lightning_nas.results import non_dominated
from lightning_nas.strategies._strategy import ProposingSampler, losses_of, seeds, strategies, violation_of

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study, StudyDirection
    from optuna.trial import FrozenTrial

    from lightning_nas.problem import Problem
    from lightning_nas.space import Architecture, SearchSpace, Value

__all__ = ["Evolution", "crowding_distances", "mutated", "ranks"]


@strategies.register("evolution")
@dataclass(frozen=True)
class Evolution:
    """Keeps the last candidates as its population, and changes one choice of the best of a few of them.

    The population is what was measured last, so every member dies of age, however good: only what is found
    good again and again stays. With several objectives the best of a tournament is on the lowest front and,
    among those, the loneliest.

    Args:
        population: members that live at the same time, at least 2; None: a quarter of the budget, within 10
            and 100, which was measured best on NAS-Bench-MACRO for budgets of 100 to 400.
        tournament: members drawn, without replacement, to choose a parent from; at least 1, at most the
            population; None: a quarter of the population.

    Raises:
        ValueError: for a value out of its range.

    Example:
        >>> Evolution(population=20)
        Evolution(population=20, tournament=None)

    Reference:
        Real, Aggarwal, Huang, Le, AAAI 2019, algorithm 1; there one objective, a population of 100 and
        tournaments of 25, which the defaults are from budgets of 400 on.
    """

    population: int | None = None
    tournament: int | None = None

    def __post_init__(self) -> None:
        if self.population is not None and self.population < 2:
            raise ValueError(f"Evolution: population must be at least 2, got {self.population}.")
        if self.tournament is not None and not 1 <= self.tournament <= (self.population or self.tournament):
            raise ValueError(
                f"Evolution: tournament must be at least 1 and at most the population ({self.population}), "
                f"got {self.tournament}."
            )

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """See :class:`~lightning_nas.strategies.Strategy`."""
        space = problem.space
        population = min(100, max(10, budget // 4)) if self.population is None else self.population
        tournament = max(2, population // 4) if self.tournament is None else min(self.tournament, population)
        own, draws = seeds(seed, proposal, 2)
        return ProposingSampler(space, draws, partial(_child, space, population, tournament, own))


def _child(
    space: SearchSpace, population: int, tournament: int, seed: int, study: Study
) -> Mapping[str, Value]:
    """The winner of a tournament among the living, changed; nothing as long as they are too few."""
    living = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))[-population:]
    if len(living) < population:
        return {}
    rng = np.random.default_rng(seed)
    entrants = rng.choice(len(living), size=tournament, replace=False)
    order = _places(living, study.directions)
    parent = living[min(entrants, key=order.__getitem__)]
    return mutated(space, space.canonical(parent.params), rng)


def mutated(space: SearchSpace, architecture: Architecture, rng: np.random.Generator) -> Architecture:
    """The architecture with one of its active choices, each as likely, at another of its values."""
    names = [name for name in space.active(architecture) if len(space[name].values) > 1]
    if not names:
        return architecture
    choice = space[names[rng.integers(len(names))]]
    others = [value for value in choice.values if value != architecture[choice.name]]
    return space.canonical({**architecture, choice.name: others[rng.integers(len(others))]})


def _places(members: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[tuple[float, ...]]:
    """What members compete by, smaller is better: violation of constraints, front, loneliness."""
    losses = losses_of(members, directions)
    rank = ranks(losses)
    distance = np.zeros(len(losses))
    for front in range(rank.max() + 1):
        distance[rank == front] = crowding_distances(losses[rank == front])
    return list(zip(map(violation_of, members), rank.tolist(), (-distance).tolist(), strict=True))


def ranks(losses: NDArray[np.float64]) -> NDArray[np.int64]:
    """The front that each row is on, counted from 0: what no other row dominates once those before are gone.

    Args:
        losses: ``(n, objectives)``, all to be minimised.

    Returns:
        ``(n,)``.
    """
    rank = np.full(len(losses), -1)
    front = 0
    while (left := np.flatnonzero(rank < 0)).size:
        rank[left[non_dominated(losses[left])]] = front
        front += 1
    return rank


def crowding_distances(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far the neighbours of each row are apart, summed over columns as shares of their range.

    The ends of a column are infinitely far; a column of equal values adds nothing.

    Args:
        losses: ``(n, objectives)``, one front.

    Returns:
        ``(n,)``.

    Reference: Deb et al., IEEE TEVC 2002, section III-B.
    """
    distance = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        if ordered[-1] > ordered[0]:
            distance[order[[0, -1]]] = np.inf
            distance[order[1:-1]] += (ordered[2:] - ordered[:-2]) / (ordered[-1] - ordered[0])
    return distance
