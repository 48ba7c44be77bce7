"""NSGA-III: NSGA-II with members kept near evenly spread directions, for three objectives and more."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from optuna.samplers import BaseSampler

from lightning_nas.strategies._strategy import losses_of, seeds, strategies, violation_of
from lightning_nas.strategies.nsga2 import NSGA2, NSGA2Sampler

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from lightning_nas.problem import Problem
    from lightning_nas.space import SearchSpace

__all__ = ["NSGA3", "survivors"]


@strategies.register("nsga3")
@dataclass(frozen=True)
class NSGA3(NSGA2):
    """Evolves a population towards the front, spread over directions instead of by crowding distance.

    Settings and operators are those of :class:`NSGA2`; the directions are as many as the population allows.

    Example:
        >>> NSGA3(population=20)
        NSGA3(population=20, crossover=0.9, swapping=0.5, mutation=None)

    Reference:
        Deb, Jain, IEEE TEVC 2014; who survives is computed by pymoo, since Optuna's NSGA-III normalises
        values as if all were to be minimised.
    """

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """See :class:`~lightning_nas.strategies.Strategy`."""
        return _NSGA3Sampler(self, problem.space, budget, seed, proposal)


class _NSGA3Sampler(NSGA2Sampler):
    def __init__(self, settings: NSGA3, space: SearchSpace, budget: int, seed: int, proposal: int) -> None:
        super().__init__(settings, space, budget, seed, proposal)
        self._seed = seed

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        members = self.get_population(study, generation - 1)
        members += self.get_parent_population(study, generation - 1)
        kept = survivors(
            losses_of(members, study.directions),
            np.array([violation_of(member) for member in members]),
            self.count,
            np.random.default_rng(
                seeds(self._seed, generation, 1)
            ),  # equal for all children, and on resuming
        )
        return sorted((members[i] for i in kept), key=lambda trial: trial.number)


def survivors(
    losses: NDArray[np.float64], violations: NDArray[np.float64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Who goes into the next generation: whole fronts, and of the last one those in the emptiest directions.

    The directions are spread evenly (Das and Dennis), as many as ``count`` allows.

    Args:
        losses: ``(n, objectives)``, all to be minimised.
        violations: ``(n,)``, of the constraints; above 0 it comes behind all at 0, the least first.
        count: how many survive.
        rng: decides between equals.

    Returns:
        ``(min(count, n),)``, their rows.
    """
    from pymoo.algorithms.moo.nsga3 import ReferenceDirectionSurvival
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.util.ref_dirs import get_reference_directions

    objectives = losses.shape[1]
    parts = 1
    while objectives > 1 and comb(parts + objectives, objectives - 1) <= count:
        parts += 1
    directions = get_reference_directions("das-dennis", objectives, n_partitions=parts)
    population = Population.new("F", losses, "G", violations[:, None])
    with warnings.catch_warnings():  # pymoo silences all warnings for good
        kept = ReferenceDirectionSurvival(directions).do(
            Problem(n_obj=objectives, n_ieq_constr=1),
            population,
            n_survive=count,
            random_state=rng,
            return_indices=True,
        )
    return np.asarray(kept, dtype=np.int64)
