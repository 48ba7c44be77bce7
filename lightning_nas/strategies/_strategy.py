"""What the search asks of a strategy, and the names it can be asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from lightning_nas.registry import Registry

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from lightning_nas.problem import Problem

__all__ = ["Strategy", "seeds", "strategies"]


class Strategy(Protocol):
    """Chooses the candidates to evaluate; usually a frozen dataclass of plain settings.

    Register a class with ``@strategies.register("name")`` to have it found by name.
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


def seeds(seed: int, proposal: int, count: int) -> list[int]:
    """Independent seeds for the generators of one proposal."""
    return [int(word) for word in np.random.SeedSequence((seed, proposal)).generate_state(count)]
