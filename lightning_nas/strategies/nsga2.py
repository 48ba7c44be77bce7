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

__all__ = ["NSGA2"]


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
            raise ValueError(f"NSGA2: population must be at least 2, got {self.population}.")
        for name in ("crossover", "swapping", "mutation"):
            probability = getattr(self, name)
            if probability is not None and not 0 <= probability <= 1:
                raise ValueError(f"NSGA2: {name} is a probability and must be in [0, 1], got {probability}.")

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """See :class:`~lightning_nas.strategies.Strategy`."""
        operators, draws = seeds(seed, proposal, 2)
        return _NSGA2Sampler(
            {c.name: CategoricalDistribution(c.values) for c in problem.space if len(c.values) > 1},
            draws,
            population_size=min(50, max(10, budget // 20)) if self.population is None else self.population,
            crossover_prob=self.crossover,
            swapping_prob=self.swapping,
            mutation_prob=self.mutation,
            seed=operators,
        )


class _NSGA2Sampler(NSGAIISampler):
    def __init__(self, space: dict[str, CategoricalDistribution], draws: int, **settings: Any) -> None:
        super().__init__(**settings)  # Any: the keywords of NSGAIISampler
        self._space = space
        # Optuna seeds the generator of operators and that of new values alike: with one proposal a sampler, a
        # mutation's value would depend on whether there was a crossover.
        self._draws = RandomSampler(seed=draws)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._space)

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        # The first child of a generation sees the parents in this order, later ones by number: one order for
        # all makes a search that resumes within a generation equal to the uninterrupted one.
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._draws.sample_independent(study, trial, param_name, param_distribution)
