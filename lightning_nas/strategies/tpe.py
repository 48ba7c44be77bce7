"""TPE: draws what is more likely among good candidates than among the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, TPESampler

from lightning_nas.strategies._strategy import seeds, strategies

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from lightning_nas.problem import Problem
    from lightning_nas.space import SearchSpace

__all__ = ["TPE"]


@strategies.register("tpe")
@dataclass(frozen=True)
class TPE:
    """Models the good candidates and the others by densities over all choices, and draws by their ratio.

    With several objectives the good ones are the first fronts. Choices are categories, without an order.

    Args:
        startup: candidates drawn at random first, at least 1.
        draws: from the good ones' density, of which the best ratio is proposed, at least 1.

    Raises:
        ValueError: for a value out of its range.

    Example:
        >>> TPE(startup=20)
        TPE(startup=20, draws=24)

    Reference:
        Bergstra, Bardenet, Bengio, Kégl, NeurIPS 2011; several objectives: Ozaki, Tanigaki, Watanabe, Onishi,
        GECCO 2020. Optuna's implementation.
    """

    startup: int = 10
    draws: int = 24

    def __post_init__(self) -> None:
        for name in ("startup", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"TPE: {name} must be at least 1, got {getattr(self, name)}.")

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """See :class:`~lightning_nas.strategies.Strategy`."""
        return _TPESampler(problem.space, self.startup, self.draws, seeds(seed, proposal, 1)[0])


class _TPESampler(TPESampler):
    def __init__(self, space: SearchSpace, startup: int, draws: int, seed: int) -> None:
        super().__init__(
            n_startup_trials=startup,
            n_ei_candidates=draws,
            seed=seed,
            multivariate=True,
            constant_liar=False,
        )
        self._space = {c.name: CategoricalDistribution(c.values) for c in space if len(c.values) > 1}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._space)  # of one proposal; Optuna would look through all trials for it
