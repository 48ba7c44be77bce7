"""What a search is asked for: costs, scalarizations, objectives and limits."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from lightning_nas.space import Architecture

__all__ = ["Bound", "Cost", "Limit", "Maximize", "Minimize", "Objective", "Scalarization", "name_of"]


@runtime_checkable
class Cost(Protocol):
    """An architecture to a number with a unit, known without evaluating it.

    One that can also count many architectures at once has a method ``many(architectures)``, which returns an
    array.
    """

    @property
    def name(self) -> str:
        """What the number is called (``"macs"``)."""

    @property
    def unit(self) -> str:
        """What it is counted in (``"MAC"``)."""

    def __call__(self, architecture: Architecture, /) -> float:
        """The cost of one architecture."""


@runtime_checkable
class Scalarization(Protocol):
    """Several quantities in one number, for a search with a single objective."""

    @property
    def name(self) -> str:
        """What the number is called; it tells the settings too, for a stored study is known again by it."""

    @property
    def unit(self) -> str:
        """What it is counted in; may be empty."""

    @property
    def parts(self) -> tuple[str | Cost, ...]:
        """What it is made of: names among the values that ``evaluate`` returns, and costs."""

    def __call__(self, values: Mapping[str, float], /) -> float:
        """The number, from the values of a candidate by name."""


Bound: TypeAlias = tuple[str, float]
"""An operator and a number: ``("<=", 2e8)``."""

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}


@dataclass(frozen=True)
class _Directed:
    """A quantity with a direction.

    Args:
        quantity: a name among the values that ``evaluate`` returns, a cost, or a scalarization.
        unit: of a named quantity, for tables and plots; the others bring their own.

    Raises:
        TypeError: if the quantity is neither a name nor a callable with ``.name`` and ``.unit``.
        ValueError: for an empty name, or a unit given beside a cost.
    """

    quantity: str | Cost | Scalarization
    unit: str = ""

    def __post_init__(self) -> None:
        name = name_of(self.quantity, type(self).__name__)
        if not isinstance(self.quantity, str):
            if self.unit and self.unit != self.quantity.unit:
                raise ValueError(
                    f"{type(self).__name__}: {name!r} is in {self.quantity.unit!r}, not {self.unit!r}. "
                    "Leave the unit out, a cost brings its own."
                )
            object.__setattr__(self, "unit", self.quantity.unit)

    @property
    def name(self) -> str:
        """The name of the quantity."""
        return name_of(self.quantity, type(self).__name__)

    @property
    def parts(self) -> tuple[str | Cost, ...]:
        """The names and costs that it is computed from: itself, but for a scalarization."""
        return self.quantity.parts if isinstance(self.quantity, Scalarization) else (self.quantity,)

    @property
    def is_cost(self) -> bool:
        """Whether it is a cost, known before evaluation."""
        return not isinstance(self.quantity, str | Scalarization)

    @property
    def label(self) -> str:
        """The name, with the unit in brackets where there is one."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name


@dataclass(frozen=True)
class Maximize(_Directed):
    """An objective that is better when larger.

    Example:
        >>> Maximize("accuracy").name
        'accuracy'
    """

    @property
    def direction(self) -> Literal["maximize"]:
        """``"maximize"``."""
        return "maximize"


@dataclass(frozen=True)
class Minimize(_Directed):
    """An objective that is better when smaller.

    Example:
        >>> Minimize("latency", unit="ms").label
        'latency [ms]'
    """

    @property
    def direction(self) -> Literal["minimize"]:
        """``"minimize"``."""
        return "minimize"


Objective: TypeAlias = Maximize | Minimize


@dataclass(frozen=True)
class Limit:
    """A bound that a value must keep.

    Args:
        name: of the value.
        operator: ``"<="``, ``"<"``, ``">="`` or ``">"``.
        bound: a finite number.

    Raises:
        ValueError: for another operator, or a bound that is not finite.

    Example:
        >>> Limit("macs", "<=", 100).holds(120), Limit("macs", "<=", 100).excess(120)
        (False, 20)
    """

    name: str
    operator: str
    bound: float

    def __post_init__(self) -> None:
        if self.operator not in _HOLDS:
            raise ValueError(
                f"Limit on {self.name!r}: the operator must be one of {', '.join(map(repr, _HOLDS))}, "
                f"got {self.operator!r}."
            )
        if not math.isfinite(self.bound):
            raise ValueError(
                f"Limit on {self.name!r}: the bound must be a finite number, got {self.bound!r}."
            )

    @classmethod
    def all_of(cls, bounds: Mapping[Any, Bound] | None, where: str) -> tuple[Limit, ...]:
        """The limits written as a mapping of names or costs to ``(operator, bound)``.

        Raises:
            TypeError: for a key that is neither a name nor a cost.
            ValueError: for a value that is not an operator and a number.
        """
        limits = []
        for quantity, bound in (bounds or {}).items():  # keys: str or a cost; Mapping is invariant in its key
            name = name_of(quantity, where)
            if isinstance(quantity, Scalarization):
                raise TypeError(f"{where}: {name!r} cannot be bounded itself; give bounds on its parts.")
            if not isinstance(bound, Sequence) or isinstance(bound, str) or len(bound) != 2:
                raise ValueError(
                    f"{where}: {name!r} needs an operator and a number, as ('<=', 2e8), got {bound!r}."
                )
            limits.append(cls(name, bound[0], float(bound[1])))
        return tuple(limits)

    def holds(self, value: float) -> bool:
        """Whether the value keeps the bound."""
        return _HOLDS[self.operator](value, self.bound)

    def excess(self, value: float) -> float:
        """By how much the value passes the bound; negative inside it."""
        return value - self.bound if self.operator.startswith("<") else self.bound - value

    def __str__(self) -> str:
        return f"{self.name} {self.operator} {self.bound:g}"


def name_of(quantity: str | Cost | Scalarization, where: str) -> str:
    """The name of a quantity.

    Raises:
        TypeError: if it is neither a name nor a callable with ``.name`` and ``.unit``.
        ValueError: if the name is empty.
    """
    name = quantity if isinstance(quantity, str) else getattr(quantity, "name", None)
    if not isinstance(name, str) or not isinstance(quantity, str | Cost):
        raise TypeError(
            f"{where}: expected the name of a value or a cost (a callable with .name and .unit), "
            f"got {quantity!r}."
        )
    if not name:
        raise ValueError(f"{where}: a name is needed, got an empty one.")
    return name
