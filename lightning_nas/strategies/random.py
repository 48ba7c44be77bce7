"""Random search: the yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.samplers import BaseSampler, RandomSampler

from lightning_nas.strategies._strategy import seeds, strategies

if TYPE_CHECKING:
    from lightning_nas.problem import Problem

__all__ = ["Random"]


@strategies.register("random")
@dataclass(frozen=True)
class Random:
    """Draws every choice uniformly and independently.

    Example:
        >>> strategies["random"]()
        Random()
    """

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """See :class:`~lightning_nas.strategies.Strategy`."""
        return RandomSampler(seed=seeds(seed, proposal, 1)[0])
