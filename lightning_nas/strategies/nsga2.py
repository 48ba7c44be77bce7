"""NSGA-II: evolution that keeps the best fronts and, within a front, the loneliest members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler

from lightning_nas.strategies._strategy import seeds, strategies

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from lightning_nas.problem import Problem
    from lightning_nas.space import SearchSpace

__all__ = ["NSGA2", "NSGA2Sampler"]


@strategies.register("nsga2")
@dataclass(frozen=True)
class NSGA2:
    """Evolves a population towards the front by dominance, crowding distance, crossover and mutation.

    A child equal to a network measured before is bred anew, so a population never fills with copies.

    Args:
        population: members of a generation, at least 2; None: a twentieth of the budget,
            within 10 and 50, which was measured best on NAS-Bench-MACRO for budgets of 100 to 400.
        crossover: probability that a child has two parents, in [0, 1].
        swapping: probability that a choice is taken from the second parent, in [0, 1].
        mutation: probability that a choice is drawn anew, in [0, 1]; None: one over the number of choices.

    Raises:
        ValueError: for a value out of its range.

    Example:
        >>> NSGA2(population=20)
        NSGA2(population=20, crossover=0.9, swapping=0.5, mutation=None)

    Reference:
        Deb, Pratap, Agarwal, Meyarivan, IEEE TEVC 2002. Optuna's operators: parents meet in tournaments of
        dominance alone, and choices are categories, so that neither crossover nor mutation assumes an order.
    """

    population: int | None = None
    crossover: float = 0.9
    swapping: float = 0.5
    mutation: float | None = None

    def __post_init__(self) -> None:
        if self.population is not None and self.population < 2:
            raise ValueError(f"{type(self).__name__}: population must be at least 2, got {self.population}.")
        for name in ("crossover", "swapping", "mutation"):
            probability = getattr(self, name)
            if probability is not None and not 0 <= probability <= 1:
                raise ValueError(
                    f"{type(self).__name__}: {name} is a probability and must be in [0, 1], "
                    f"got {probability}."
                )

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """See :class:`~lightning_nas.strategies.Strategy`."""
        return NSGA2Sampler(self, problem.space, budget, seed, proposal)


class NSGA2Sampler(NSGAIISampler):
    """Makes one proposal."""

    def __init__(self, settings: NSGA2, space: SearchSpace, budget: int, seed: int, proposal: int) -> None:
        operators, draws = seeds(seed, proposal, 2)
        self.count = min(50, max(10, budget // 20)) if settings.population is None else settings.population
        super().__init__(
            population_size=self.count,
            crossover_prob=settings.crossover,
            swapping_prob=settings.swapping,
            mutation_prob=settings.mutation,
            seed=operators,
        )
        self._space = {c.name: CategoricalDistribution(c.values) for c in space if len(c.values) > 1}
        # Optuna seeds the generator of operators and that of new values alike: with one proposal a sampler, a
        # mutation's value would depend on whether there was a crossover.
        self._draws = RandomSampler(seed=draws)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every choice that has one."""
        return dict(self._space)

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        """Who survives, in the order of evaluation."""
        # The first child of a generation sees the parents in this order, later ones by number: one order for
        # all makes a search that resumes within a generation equal to the uninterrupted one.
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value drawn anew: in the first generation, and by mutation."""
        return self._draws.sample_independent(study, trial, param_name, param_distribution)
