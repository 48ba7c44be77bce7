"""Successive halving: many candidates on a share of the data, the better ones on more, few on all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from optuna.samplers import BaseSampler
from optuna.trial import TrialState
from typing_extensions import override

from lightning_nas.results import Candidate, losses
from lightning_nas.space import Architecture
from lightning_nas.strategies._evolve import ranked
from lightning_nas.strategies._strategy import SHARE, DrawingSampler, note, seeds, strategies

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from lightning_nas.problem import Problem

__all__ = ["SuccessiveHalving", "rungs"]

_WHOLE = 1 - 1e-9  # left for the last evaluation, as sums of shares come out


@strategies.register("successive-halving")
@dataclass(frozen=True)
class SuccessiveHalving:
    """Measures random candidates on a share of the data, and those that do well there on ever more of it.

    There are ``steps`` rungs: the last one is a whole evaluation, each before it takes one ``eta``-th of the
    next. A candidate in the best ``eta``-th of its rung is measured on the next one; if there is none such,
    a new one is drawn for the first rung. Nobody waits for a rung to be full (ASHA), so that any number of
    workers are busy, and some are promoted that later ones would have outrun. With several objectives a rung
    is ordered by fronts and, within a front, by loneliness.

    It calls ``evaluate(arch, share=1/9)``; a share counts as that much of an evaluation in the budget. The
    last whole evaluation of the budget goes to the best candidate of the highest rung.

    Args:
        eta: one of so many is promoted, and gets so many times the data; at least 2.
        steps: how many rungs, at least 2.

    Raises:
        ValueError: for a value out of its range.

    Example:
        >>> SuccessiveHalving(steps=4).shares
        (0.037037037037037035, 0.1111111111111111, 0.3333333333333333, 1.0)

    Reference:
        Jamieson, Talwalkar, AISTATS 2016; Li et al., A System for Massively Parallel Hyperparameter Tuning,
        MLSys 2020, algorithm 2 (ASHA).
    """

    eta: int = 3
    steps: int = 3

    partial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.eta < 2 or self.steps < 2:
            raise ValueError(
                f"SuccessiveHalving: eta and steps must be at least 2, got {self.eta} and {self.steps}."
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """What each rung takes of a whole evaluation."""
        return tuple(1 / self.eta**step for step in reversed(range(self.steps)))

    def sampler(self, problem: Problem, budget: int, seed: int, proposal: int) -> BaseSampler:
        """See :class:`~lightning_nas.strategies.Strategy`."""
        return _HalvingSampler(self, problem, budget, seeds(seed, proposal, 1)[0])


def rungs(count: int, smallest: int, largest: int, eta: int = 3) -> list[tuple[int, int]]:
    """How many candidates synchronous successive halving measures with how much, rung by rung.

    ``n_k = floor(n / eta^k)`` candidates with ``r_k = r eta^k``, up to ``r_k <= R``.

    Args:
        count: n, candidates of the first rung.
        smallest: r, what one of them gets.
        largest: R, the most that one may get.
        eta: at least 2.

    Example:
        >>> rungs(81, 1, 81)
        [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)]

    Reference: Li et al., Hyperband, JMLR 2018, algorithm 1.
    """
    sizes = []
    while smallest <= largest:
        sizes.append((count, smallest))
        count, smallest = count // eta, smallest * eta  # floors of floors are the floor
    return sizes


class _HalvingSampler(DrawingSampler):
    def __init__(self, settings: SuccessiveHalving, problem: Problem, budget: int, seed: int) -> None:
        super().__init__(problem.space, seed)
        self.settings, self.problem, self.budget = settings, problem, budget

    @override
    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        told = [other for other in trials if "measured" in other.user_attrs]
        since = trials[told[-1].number + 1 :] if told else trials
        asked = {self._where(other) for other in since if other.params}  # known elsewhere, or rejected
        done = asked | {self._where(other) for other in told}
        left = self.budget - sum(_share(other) for other in told)
        shares = self.settings.shares
        ladder = [
            self._ordered([t for t in told if _share(t) == share and t.state is TrialState.PRUNED])
            for share in shares[:-1]
        ]

        def unmeasured(rung: Sequence[FrozenTrial], share: float) -> FrozenTrial | None:
            above = {key for key, reached in done if reached >= share}
            return next((member for member in rung if self._where(member)[0] not in above), None)

        def propose(member: FrozenTrial | None, share: float) -> dict[str, Any]:
            if share < 1:
                note(study, trial, SHARE, share)
            return dict(member.params) if member else {}

        for rung, share in reversed(list(zip(ladder, shares[1:], strict=True))):
            member = unmeasured(rung[: len(rung) // self.settings.eta], share)
            if member and (share == 1 or left - share >= _WHOLE):
                return propose(member, share)
        if left - shares[0] >= _WHOLE:
            return propose(None, shares[0])
        best = (member for rung in reversed(ladder) if (member := unmeasured(rung, 1.0)))
        return propose(next(best, None), 1.0)

    def _where(self, trial: FrozenTrial) -> tuple[str, float]:
        return self.problem.space.canonical(trial.params).key, _share(trial)

    def _ordered(self, members: list[FrozenTrial]) -> list[FrozenTrial]:
        """From best to worst; what breaks constraints on measured values last, on costs not at all."""
        problem = self.problem
        values = [trial.user_attrs["measured"] for trial in members]
        excess = [problem.excess_of(problem.limits, row) for row in values]
        kept = [i for i, e in enumerate(excess) if e == 0]
        rest = [i for i, e in enumerate(excess) if e > 0 and problem.excess(values[i]) == 0]
        if kept:
            candidates = [Candidate(Architecture({}), values[i]) for i in kept]
            kept = [kept[i] for i in ranked(losses(problem.objectives, candidates))]
        return [members[i] for i in (*kept, *sorted(rest, key=excess.__getitem__))]


def _share(trial: FrozenTrial) -> float:
    return float(trial.system_attrs.get(SHARE, 1.0))
