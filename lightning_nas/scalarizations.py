"""Several quantities in one number: what turns a search for a front into a search for one network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lightning_nas.objectives import Cost, name_of

__all__ = ["AbsoluteReward", "Chebyshev", "HingeReward", "MnasNetReward"]

Quantity: TypeAlias = str | Cost


@dataclass(frozen=True)
class _Reward:
    """An accuracy that is reduced where a cost misses its target; to be maximised.

    Args:
        accuracy: a name among the measured values, larger is better.
        cost: a cost, or a name among the measured values.
        target: of the cost, in its unit, above 0.
    """

    accuracy: Quantity
    cost: Quantity
    target: float

    def __post_init__(self) -> None:
        where = type(self).__name__
        for quantity in self.parts:
            name_of(quantity, where)  # raises
        if not 0 < self.target < math.inf:
            raise ValueError(
                f"{where}: target is a cost to aim at and must be above 0 and finite, got {self.target!r}."
            )

    @property
    def unit(self) -> str:
        """None: it is a number to compare by."""
        return ""

    @property
    def parts(self) -> tuple[Quantity, ...]:
        """The accuracy and the cost."""
        return self.accuracy, self.cost

    @property
    def _names(self) -> tuple[str, str]:
        return name_of(self.accuracy, "a reward"), name_of(self.cost, "a reward")

    @property
    def _ratio(self) -> str:
        return f"{self._names[1]} / {_number(self.target)}"

    def _read(self, values: Mapping[str, float]) -> tuple[float, float]:
        """The accuracy, and the cost in units of the target."""
        accuracy, cost = self._names
        return values[accuracy], values[cost] / self.target


@dataclass(frozen=True)
class MnasNetReward(_Reward):
    """Accuracy times a power of the cost, to be maximised.

    ``accuracy * (cost / target) ** w``, where ``w`` is ``alpha`` up to the target and ``beta`` beyond it. The
    default is the soft constraint: a twentieth more accuracy is worth twice the cost, on either side of the
    target. ``alpha=0, beta=-1`` is the hard one: nothing is gained below the target.

    Args:
        accuracy: a name among the measured values, larger is better.
        cost: a cost, or a name among the measured values, above 0.
        target: of the cost, in its unit, above 0.
        alpha: exponent up to the target, at most 0.
        beta: exponent beyond the target, at most 0.

    Raises:
        ValueError: for a value out of its range; when called, for a cost that is not above 0.

    Example:
        >>> reward = MnasNetReward("accuracy", "latency", target=75)
        >>> reward.name
        'accuracy * (latency / 75)^-0.07'
        >>> round(reward({"accuracy": 0.75, "latency": 150.0}), 5)
        0.71448

    Reference: Tan et al., MnasNet, CVPR 2019, equation 2.
    """

    alpha: float = -0.07
    beta: float = -0.07

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            exponent = getattr(self, name)
            if not -math.inf < exponent <= 0:
                raise ValueError(
                    f"MnasNetReward: {name} is an exponent of the cost and must be at most 0, got {exponent}."
                )

    @property
    def name(self) -> str:
        """The formula."""
        exponents = dict.fromkeys(map(_number, (self.alpha, self.beta)))
        power = exponents.popitem()[0] if len(exponents) == 1 else f"({' or '.join(exponents)})"
        return f"{self._names[0]} * ({self._ratio})^{power}"

    def __call__(self, values: Mapping[str, float], /) -> float:
        """The reward of a candidate with these values."""
        accuracy, ratio = self._read(values)
        if ratio <= 0:
            raise ValueError(
                f"MnasNetReward: {self._names[1]} must be above 0, got {ratio * self.target:g}. "
                "HingeReward takes any cost."
            )
        return float(accuracy * ratio ** (self.alpha if ratio <= 1 else self.beta))


@dataclass(frozen=True)
class _Weighted(_Reward):
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"{type(self).__name__}: weight must be from 0 up, got {self.weight}.")


@dataclass(frozen=True)
class HingeReward(_Weighted):
    """Accuracy less a penalty for what the cost is beyond its target, to be maximised.

    ``accuracy - weight * max(0, cost / target - 1)``: below the target the cost does not matter.

    Args:
        accuracy: a name among the measured values, larger is better.
        cost: a cost, or a name among the measured values.
        target: of the cost, in its unit, above 0.
        weight: the accuracy that once the target too much costs, from 0 up.

    Raises:
        ValueError: for a value out of its range.

    Example:
        >>> HingeReward("accuracy", "latency", target=75, weight=0.1)({"accuracy": 0.75, "latency": 150.0})
        0.65
    """

    @property
    def name(self) -> str:
        """The formula."""
        return f"{self._names[0]} - {_number(self.weight)} * max(0, {self._ratio} - 1)"

    def __call__(self, values: Mapping[str, float], /) -> float:
        """The reward of a candidate with these values."""
        accuracy, ratio = self._read(values)
        return accuracy - self.weight * max(ratio - 1, 0.0)  # in this order nan stays nan


@dataclass(frozen=True)
class AbsoluteReward(_Weighted):
    """Accuracy less a penalty for any distance of the cost from its target, to be maximised.

    ``accuracy - weight * |cost / target - 1|``: its best networks are at the target, where those of
    :class:`MnasNetReward` may be below it.

    Args:
        accuracy: a name among the measured values, larger is better.
        cost: a cost, or a name among the measured values.
        target: of the cost, in its unit, above 0.
        weight: the accuracy that a distance of once the target costs, from 0 up.

    Raises:
        ValueError: for a value out of its range.

    Example:
        >>> reward = AbsoluteReward("accuracy", "latency", target=100, weight=0.5)
        >>> reward({"accuracy": 0.75, "latency": 50.0})
        0.5

    Reference: Bender et al., TuNAS, CVPR 2020; there the weight is -beta.
    """

    @property
    def name(self) -> str:
        """The formula."""
        return f"{self._names[0]} - {_number(self.weight)} * |{self._ratio} - 1|"

    def __call__(self, values: Mapping[str, float], /) -> float:
        """The reward of a candidate with these values."""
        accuracy, ratio = self._read(values)
        return accuracy - self.weight * abs(ratio - 1)


@dataclass(frozen=True)
class Chebyshev:
    """The largest weighted distance of any quantity from an ideal point, to be minimised.

    ``max_i weight_i * |value_i - ideal_i|``. For each point of a front, also where that bends inwards, there
    are weights that make it the best.

    Args:
        parts: costs and names of measured values.
        weights: one a part, above 0: one over the range of interest.
        ideal: one a part: the best value that can be.

    Raises:
        ValueError: for lengths that differ, or weights out of their range.

    Example:
        >>> Chebyshev(("error", "latency"), weights=(2.0, 0.01), ideal=(0.0, 0.0)).name
        'max(2 * |error - 0|, 0.01 * |latency - 0|)'

    Reference: Bowman 1976; Miettinen, Nonlinear Multiobjective Optimization, 1999, section 3.4.
    """

    parts: tuple[Quantity, ...]
    weights: tuple[float, ...]
    ideal: tuple[float, ...]

    def __post_init__(self) -> None:
        for field in ("parts", "weights", "ideal"):
            given: Sequence[object] = getattr(self, field)
            object.__setattr__(self, field, tuple(given))
        if not len(self.parts) == len(self.weights) == len(self.ideal) > 0:
            raise ValueError(
                "Chebyshev: parts, weights and ideal need one entry each for every part, got "
                f"{len(self.parts)}, {len(self.weights)} and {len(self.ideal)}."
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"Chebyshev: weights must be above 0 and finite, got {self.weights}.")
        for part in self.parts:
            name_of(part, "Chebyshev")  # raises

    @property
    def name(self) -> str:
        """The formula."""
        terms = [f"{_number(w)} * |{name} - {_number(z)}|" for name, w, z in self._terms]
        return f"max({', '.join(terms)})"

    @property
    def unit(self) -> str:
        """None: it is a number to compare by."""
        return ""

    def __call__(self, values: Mapping[str, float], /) -> float:
        """The distance of a candidate with these values."""
        distances = [w * abs(values[name] - z) for name, w, z in self._terms]
        return math.nan if any(map(math.isnan, distances)) else max(distances)

    @property
    def _terms(self) -> list[tuple[str, float, float]]:
        names = [name_of(part, "Chebyshev") for part in self.parts]
        return list(zip(names, self.weights, self.ideal, strict=True))


def _number(value: float) -> str:
    """With every digit that a setting is written with."""
    return f"{value:.15g}"
