"""Paired racing: a candidate stops being measured once a rival that costs no more is surely better.

The evidence is an anytime-valid test by betting, for means of a finite population drawn without replacement:
it may be looked at after every part of the data. A candidate is tested against one number only, the value of
the best rival that costs no more, so that many rivals are no more tests than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_nas.objectives import Cost
from lightning_nas.space import Architecture

__all__ = ["Race", "Racing", "Rivals", "Run"]

_BETS = np.geomspace(0.1, 0.95, 6)[:, None, None]  # shares of what may be staked; their mean is held


@dataclass(frozen=True)
class Racing:
    """How sure a race must be before it stops a candidate.

    With probability of at least ``1 - error_rate`` a search stops no candidate that full measurement would
    have put on the front when its turn came; so its front is that of full measurement. It holds for samples
    in random order: of an order by class the first part misleads. Shuffle validation data once. It is exact
    where the order has no part in which candidates are proposed (random search, a new order for each
    candidate); a strategy that reads the estimates of stopped candidates makes it an approximation.

    Args:
        error_rate: of the whole search, in (0, 1).
        front: how many candidates may enter the front in the course of the search, at most: each may be
            stopped wrongly with probability ``error_rate / front``. The search's budget is always enough.
        bounds: the smallest and the largest score of a sample (correct or not: 0 and 1). None for a score
            without bounds, and for means over batches: the differences to a rival are then taken to be
            spread symmetrically about their mean, and a candidate is seen on a dozen parts at least.

    Raises:
        ValueError: for an argument out of range.

    Reference: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024,
    section 5 (without replacement); control variates as in their RiLACS, 2021. Ours is one-sided, holds the
    mean of a grid of bets and of two references.
    """

    error_rate: float = 0.05
    front: int = 50
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.error_rate < 1:
            raise ValueError(f"Racing: error_rate must be above 0 and below 1, got {self.error_rate}.")
        if self.front < 1:
            raise ValueError(f"Racing: front must be at least 1 candidate, got {self.front}.")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(
                f"Racing: bounds are the smallest and the largest score, in this order, got {self.bounds}; "
                "None where there are none."
            )

    @property
    def threshold(self) -> float:
        """Logarithm of the evidence at which a candidate stops (Ville's inequality)."""
        return float(np.log(self.front / self.error_rate))


class Evidence:
    """Evidence that the mean of all scores is below a bar, from those seen so far, in random order.

    A gambler bets that the candidate falls behind a reference whose scores are all known. While the mean is
    at least the bar, his wealth is a supermartingale from 1, so it ever reaches ``1 / a`` with probability of
    at most ``a``.

    Args:
        totals: weighted sums of all scores of each reference, ``(references,)``.
        weight: of all samples together.
        bar: the mean to fall behind.
        is_bounded: whether differences are in [-1, 1]; otherwise symmetric about their mean.
    """

    def __init__(self, totals: NDArray[Any], weight: float, bar: float, is_bounded: bool) -> None:
        self._missing, self._left, self._goal = totals[:, None].copy(), weight, bar * weight
        self._is_bounded = is_bounded
        self._wealth = np.zeros((len(_BETS), len(totals)))  # logarithms
        self._squares, self._count = np.zeros((len(totals), 1)), 0

    @property
    def log(self) -> float:
        """Logarithm of the wealth."""
        return float(np.logaddexp.reduce(self._wealth, axis=None) - np.log(self._wealth.size))

    def add(self, scores: NDArray[Any], references: NDArray[Any], weights: NDArray[Any]) -> None:
        """See the next scores.

        Args:
            scores: of the candidate, ``(samples,)``.
            references: scores of the references for the same samples, ``(references, samples)``.
            weights: of the samples, ``(samples,)``.
        """
        left = self._left - _before(weights)
        # How far the rest may fall behind the references on average, for the mean to be at the bar still.
        allowed = (
            self._missing - _before(weights * references) - self._goal + _before(weights * scores)
        ) / left
        excess = references - scores - allowed
        if self._is_bounded:
            stake = 1 + allowed  # the most that can be lost
            payoff = np.divide(excess, stake, out=np.zeros_like(excess), where=stake > 1e-9)
            gain = np.log1p(_BETS * np.maximum(payoff, -1.0))
            gain[:, stake < -1e-9] = np.inf  # not even a perfect rest would reach the bar
        else:
            squares = self._squares + _before(excess**2)
            scale = 1.5 * np.sqrt(squares / np.maximum(self._count + np.arange(len(scores)), 1))
            payoff = np.divide(excess, scale, out=np.zeros_like(excess), where=scale > 0)
            gain = np.log1p(_BETS * np.clip(payoff, -1.0, 1.0))
            self._squares = self._squares + (excess**2).sum(1, keepdims=True)
        self._wealth = self._wealth + gain.sum(2)
        self._count += len(scores)
        self._left -= weights.sum()
        self._missing = self._missing - (weights * references).sum(1, keepdims=True)
        self._goal -= (weights * scores).sum()


def _before(values: NDArray[Any]) -> NDArray[Any]:
    """Sums of what comes before each place, along the last axis."""
    sums: NDArray[Any] = np.cumsum(values, -1) - values
    return sums


@dataclass(frozen=True, eq=False)
class _Measured:
    """A candidate that was measured on everything."""

    costs: tuple[float, ...]
    value: float
    parts: dict[int, NDArray[Any]]


class Rivals:
    """What was measured on everything, and may stop those that come later.

    Args:
        racing: how sure to be.
        mode: whether a larger value is better (``"max"``) or a smaller one (``"min"``).

    Raises:
        ValueError: for another mode.
    """

    def __init__(self, racing: Racing | None, mode: Literal["max", "min"] = "max") -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"Race: mode must be 'max' or 'min', got {mode!r}.")
        self.racing = racing
        low, high = (0.0, 1.0) if racing is None or racing.bounds is None else racing.bounds
        self._unit = (high - low) * (1 if mode == "max" else -1)
        self._measured: list[_Measured] = []
        self._sums: dict[int, NDArray[Any]] = {}  # of the scores of all that were measured, part by part
        self._weights: dict[int, NDArray[Any]] = {}
        self._count = 0

    def start(self, costs: Iterable[float] = ()) -> Run:
        """Begin to measure a candidate with these values of the other objectives, smaller ones better."""
        return Run(self, tuple(costs))

    def _against(self, costs: tuple[float, ...]) -> _Measured | None:
        """The best of those that cost no more."""
        able = [m for m in self._measured if all(a <= b for a, b in zip(m.costs, costs, strict=True))]
        return max(able, key=lambda m: m.value, default=None)

    def _finished(self, run: Run) -> None:
        if not self._count:
            self._weights = run.weights
        self._sums = {part: self._sums.get(part, 0.0) + scores for part, scores in run.parts.items()}
        self._count += 1
        new = _Measured(run.costs, run.mean, run.parts)
        beaten = [
            m for m in self._measured
            if m.value <= new.value and all(a <= b for a, b in zip(new.costs, m.costs, strict=True))
        ]  # fmt: skip
        self._measured = [m for m in self._measured if m not in beaten]
        if (best := self._against(new.costs)) is None or best.value < new.value:
            self._measured.append(new)


class Run:
    """One candidate on its way through the data.

    Attributes:
        is_stopped: whether a rival was surely better.
    """

    def __init__(self, rivals: Rivals, costs: tuple[float, ...]) -> None:
        self.costs, self.is_stopped = costs, False
        self.parts: dict[int, NDArray[Any]] = {}
        self.weights: dict[int, NDArray[Any]] = {}
        self._rivals = rivals
        self._rival = None if rivals.racing is None else rivals._against(costs)
        if self._rival is not None and rivals.racing is not None:
            self._known, self._sums, self._count = rivals._weights, rivals._sums, rivals._count
            self._weight = float(sum(weights.sum() for weights in self._known.values()))
            mean = sum((self._known[part] * sums).sum() for part, sums in self._sums.items()) / self._count
            totals = np.array([self._rival.value * self._weight, mean])
            bounded = rivals.racing.bounds is not None
            self._evidence = Evidence(totals, self._weight, self._rival.value, bounded)

    def add(self, scores: ArrayLike, part: int | None = None, weight: float = 1.0) -> bool:
        """Take the scores of the next part.

        Args:
            scores: one a sample, ``(samples,)``; or one number for a whole batch.
            part: which part of the data it is; None: the next one.
            weight: of each of them: of a batch the number of samples.

        Returns:
            Whether the candidate stops here.

        Raises:
            ValueError: for scores that are not finite or out of bounds, or more or fewer than the rival's.
        """
        given = np.atleast_1d(np.asarray(scores, dtype=np.float64))
        part = len(self.parts) if part is None else part
        self._refuse(given)
        own, weights = given / self._rivals._unit, np.full(len(given), float(weight))
        self.parts[part], self.weights[part] = own, weights
        if self._rival is None:
            return False
        if part not in self._known or not np.array_equal(self._known[part], weights):
            raise ValueError(
                f"Race: part {part} has {len(own)} scores of weight {weight:g}, but a rival has other ones "
                "there. All candidates must be measured on the same data in the same order."
            )
        self._evidence.add(own, np.stack([self._rival.parts[part], self._sums[part] / self._count]), weights)
        if len(self.parts) < len(self._known):
            assert self._rivals.racing is not None  # there is a rival
            self.is_stopped = self._evidence.log >= self._rivals.racing.threshold and self._lag > 0
        return self.is_stopped

    def finish(self) -> None:
        """Say that there is no more data; a candidate that was not stopped becomes a rival of later ones.

        Raises:
            ValueError: if there was no score, or less data than a rival had.
        """
        if not sum(map(len, self.parts.values())):
            raise ValueError("Race: there is no score, since the data is empty.")
        if self.is_stopped or self._rivals.racing is None:
            return
        if self._rivals._count and self.parts.keys() != self._rivals._weights.keys():
            raise ValueError(
                f"Race: the candidate was measured on {len(self.parts)} parts, a rival on "
                f"{len(self._rivals._weights)}. All must be measured on the same data in the same order."
            )
        self._rivals._finished(self)

    @property
    def mean(self) -> float:
        """Weighted mean of what was seen, larger better."""
        order = sorted(self.parts)
        return float(
            np.average(
                np.concatenate([self.parts[part] for part in order]),
                weights=np.concatenate([self.weights[part] for part in order]),
            )
        )

    @property
    def value(self) -> float:
        """The mean of all scores; of a stopped candidate an estimate.

        That is the rival's value less the mean difference to the rival so far, which is above zero: what is
        stopped stays dominated. On average it is a little too low, as differences at a stopping time are.
        """
        if self.is_stopped and self._rival is not None:
            return (self._rival.value - self._lag) * self._rivals._unit
        return self.mean * self._rivals._unit

    @property
    def share(self) -> float:
        """The share of the data that was measured."""
        if not self.is_stopped:
            return 1.0
        return float(sum(weights.sum() for weights in self.weights.values()) / self._weight)

    @property
    def _lag(self) -> float:
        """By how much the rival is better on what was seen."""
        assert self._rival is not None  # it is asked for where there is one
        lag = sum((self.weights[p] * (self._rival.parts[p] - own)).sum() for p, own in self.parts.items())
        return float(lag / sum(weights.sum() for weights in self.weights.values()))

    def _refuse(self, scores: NDArray[Any]) -> None:
        racing = self._rivals.racing
        if scores.ndim != 1 or not np.isfinite(scores).all():
            raise ValueError(f"Race: scores must be finite numbers, one a sample, got shape {scores.shape}.")
        if racing is not None and racing.bounds is not None and len(scores):
            low, high = racing.bounds
            if scores.min() < low or scores.max() > high:
                raise ValueError(
                    f"Race: scores from {scores.min():g} to {scores.max():g} pass bounds={racing.bounds}; "
                    "give Racing(bounds=(smallest, largest)), or None where there are none."
                )


class Race:
    """A measurement that is made part by part, as the ``evaluate`` of a search that stops early.

    Everything that is stopped is dominated by a candidate that was measured on everything, so the members of
    the front are always of the latter kind. Each result says as ``"share"`` which share of the data it is
    from. Nothing is kept on disk: in a resumed search the first candidates have no rivals and are measured
    on everything, unless the front is measured again first, ``for c in result.front: race(c.architecture)``.

    Example:
        >>> import lightning_nas as nas, numpy as np
        >>> space = nas.SearchSpace([nas.Choice("depth", (1, 2, 3))])
        >>> class Size:
        ...     name, unit = "size", "blocks"
        ...     def __call__(self, architecture):
        ...         return abs(architecture["depth"] - 2.5)
        >>> def parts(architecture):  # of 1,000 samples 100 a part; architecture 2 is right in 9 of 10
        ...     rng = np.random.default_rng(architecture["depth"])
        ...     for _ in range(10):
        ...         yield rng.random(100) < (0.9 if architecture["depth"] == 2 else 0.5)
        >>> race = Race(parts, costs=[Size()])
        >>> [race(space.architecture({"depth": depth}))["share"] for depth in (2, 1, 3)]
        [1.0, 0.1, 0.1]

    Args:
        parts: gives, for an architecture, the scores of the next samples again and again, ``(samples,)``:
            the same samples in the same random order for each architecture. What it has not been asked for
            is not computed, if it is a generator.
        metric: the name of the value: the mean of the scores.
        mode: whether a larger one is better (``"max"``) or a smaller one (``"min"``).
        costs: all other objectives of the search, to be minimised.
        racing: how sure to be.

    Raises:
        ValueError: for an unknown mode; when called, for scores that are not finite, out of bounds, or of
            other data than a rival's.
    """

    def __init__(
        self,
        parts: Callable[[Architecture], Iterable[ArrayLike]],
        metric: str = "accuracy",
        mode: Literal["max", "min"] = "max",
        costs: Sequence[Cost] = (),
        racing: Racing | None = None,
    ) -> None:
        self.parts, self.metric, self.costs = parts, metric, tuple(costs)
        self.rivals = Rivals(racing or Racing(), mode)

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        """Measure an architecture until it is surely dominated, or on everything."""
        run = self.rivals.start(cost(architecture) for cost in self.costs)
        for scores in self.parts(architecture):
            if run.add(scores):
                break
        run.finish()
        return {self.metric: run.value, "share": run.share}
