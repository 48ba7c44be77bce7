"""What the search asks of a strategy, and the names it can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection

from lightning_nas.registry import Registry

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from lightning_nas.problem import Problem
    from lightning_nas.space import SearchSpace, Value

__all__ = [
    "PREDICTED",
    "SHARE",
    "DrawingSampler",
    "ProposingSampler",
    "Strategy",
    "losses_of",
    "note",
    "seeds",
    "strategies",
    "violation_of",
]

PREDICTED = "lightning_nas:predicted"
"""What a sampler expects of a proposal: names to numbers."""
SHARE = "lightning_nas:share"
"""On how much of the data a sampler wants a proposal evaluated, in (0, 1)."""


class Strategy(Protocol):
    """Chooses the candidates to evaluate; usually a frozen dataclass of plain settings.

    Register a class with ``@strategies.register("name")`` to have it found by name.

    One that has an attribute ``partial = True`` may ask for a proposal to be evaluated on a share of the
    data, by :func:`note` of its sampler on the trial: ``note(study, trial, SHARE, 1 / 9)``. What that gave is
    a pruned trial in the studies of such strategies, and in no other's.
    """

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """The Optuna sampler that makes one proposal.

        It is called anew for every proposal, and what the sampler knows it must read from the Optuna study it
        is asked with: so equal seeds give equal studies, and a resumed search is the uninterrupted one. The
        study holds one categorical parameter a choice, and as complete trials only distinct candidates that
        were measured.

        Args:
            problem: what is searched for: its space, objectives and costs.
            budget: evaluations of the whole search.
            seed: of the whole search.
            proposal: how many proposals were made before; :func:`seeds` mixes it with the seed.
        """


strategies: Registry[type[Strategy]] = Registry("strategy")


def note(study: Study, trial: FrozenTrial, name: str, value: Any) -> None:
    """Write on a proposal what the search shall read: :data:`PREDICTED` or :data:`SHARE`."""
    study._storage.set_trial_system_attr(trial._trial_id, name, value)  # as Optuna's own samplers do


def seeds(seed: int, proposal: int, count: int) -> list[int]:
    """Independent seeds for the generators of one proposal."""
    return [int(word) for word in np.random.SeedSequence((seed, proposal)).generate_state(count)]


def losses_of(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> NDArray[np.float64]:
    """Values of complete trials with the sign that makes smaller better, ``(trials, objectives)``."""
    signs = [-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in directions]
    values: NDArray[np.float64] = np.array([trial.values for trial in trials]).reshape(-1, len(signs)) * signs
    return values


def violation_of(trial: FrozenTrial) -> float:
    """How far a complete trial is beyond its constraints; 0 if it keeps them."""
    return sum(max(0.0, value) for value in (trial.constraints or {}).values())


class DrawingSampler(BaseSampler):
    """Draws at random each choice that ``sample_relative`` leaves out.

    Args:
        space: that is searched.
        seed: of the random draws.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space = space
        self._draws = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every choice."""
        return {choice.name: CategoricalDistribution(choice.values) for choice in self._space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value."""
        return self._draws.sample_independent(study, trial, param_name, param_distribution)


class ProposingSampler(DrawingSampler):
    """Proposes what a function makes of the study.

    Args:
        space: that is searched.
        seed: of the random draws.
        propose: the study to values by choice; an empty mapping for a random architecture.
    """

    def __init__(
        self, space: SearchSpace, seed: int, propose: Callable[[Study], Mapping[str, Value]]
    ) -> None:
        super().__init__(space, seed)
        self._propose = propose

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What the function proposes."""
        return dict(self._propose(study))
