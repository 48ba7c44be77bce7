"""What is searched for: the space, the objectives and the constraints, checked together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from lightning_nas.objectives import (
    Bound,
    Cost,
    Limit,
    Maximize,
    Minimize,
    Objective,
    Scalarization,
    name_of,
)
from lightning_nas.registry import nearest
from lightning_nas.space import Architecture, SearchSpace

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """What is searched for: what a stored study must share, and the constraints of this call."""

    space: SearchSpace
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    costs: dict[str, Cost]

    @classmethod
    def checked(
        cls, space: SearchSpace, objectives: Sequence[Objective], constraints: Mapping[Any, Bound] | None
    ) -> Problem:
        """The problem that these arguments of ``nas.search`` make.

        Raises:
            TypeError: for what is no objective or cost.
            ValueError: for none, repeated or clashing names.
        """
        objectives = tuple(objectives) if isinstance(objectives, Sequence) else (objectives,)
        if not objectives:
            raise ValueError(
                "search: at least one objective is needed, as [Maximize('accuracy'), Minimize(macs)]."
            )
        for objective in objectives:
            if not isinstance(objective, Maximize | Minimize):
                raise TypeError(f"search: an objective is Maximize(...) or Minimize(...), got {objective!r}.")
        names = [objective.name for objective in objectives]
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(
                f"search: each objective once; given more than once: {', '.join(map(repr, repeated))}."
            )
        limits = Limit.all_of(constraints, "search: constraints")
        costs: dict[str, Cost] = {}
        parts = [part for objective in objectives for part in objective.parts]
        for quantity in (*parts, *(constraints or {})):
            if not isinstance(quantity, str) and costs.setdefault(quantity.name, quantity) is not quantity:
                raise ValueError(
                    f"search: two costs are named {quantity.name!r}; give the same one in both places."
                )
        for name in (*names, *(name_of(part, "search") for part in parts), *(limit.name for limit in limits)):
            if name in space:
                raise ValueError(
                    f"search: {name!r} is a choice of the space and cannot also be a measured value."
                )
        return cls(space, objectives, limits, costs)

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """The values that every candidate must have."""
        return tuple(
            dict.fromkeys((*(o.name for o in self.objectives), *(limit.name for limit in self.limits)))
        )

    @cached_property
    def scalarizations(self) -> dict[str, Scalarization]:
        """The objectives that are computed from other values, by name."""
        return {o.name: o.quantity for o in self.objectives if isinstance(o.quantity, Scalarization)}

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The values that must be measured or be costs: what is needed, or what that is computed from."""
        parts = (name_of(part, "search") for o in self.objectives for part in o.parts)
        return tuple(dict.fromkeys((*parts, *(limit.name for limit in self.limits))))

    @cached_property
    def computed(self) -> frozenset[str]:
        """The values that are not measured."""
        return frozenset((*self.costs, *self.scalarizations))

    @cached_property
    def analytic(self) -> tuple[Limit, ...]:
        """The constraints that are decided before evaluation."""
        return tuple(limit for limit in self.limits if limit.name in self.costs)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """How Optuna sees the choices."""
        return {choice.name: CategoricalDistribution(choice.values) for choice in self.space}

    @cached_property
    def bounded(self) -> dict[str, Cost]:
        """The costs that have constraints."""
        return {limit.name: self.costs[limit.name] for limit in self.analytic}

    @cached_property
    def counted(self) -> dict[str, Cost]:
        """The costs that are computed; those with ``is_measured`` take time, as evaluation does."""
        return {name: cost for name, cost in self.costs.items() if not getattr(cost, "is_measured", False)}

    def costs_of(
        self, architecture: Architecture, costs: Mapping[str, Cost] | None = None
    ) -> dict[str, float]:
        """All costs, of objectives and constraints, or some of them, by name."""
        costs = self.costs if costs is None else costs
        return {name: float(cost(architecture)) for name, cost in costs.items()}

    def costs_of_all(
        self, architectures: Sequence[Architecture], costs: Mapping[str, Cost] | None = None
    ) -> list[dict[str, float]]:
        """As :meth:`costs_of`, with each cost's own ``many`` where it has one."""
        rows: list[dict[str, float]] = [{} for _ in architectures]
        for name, cost in (self.costs if costs is None else costs).items():
            many: Callable[[Sequence[Architecture]], Iterable[float]] | None = getattr(cost, "many", None)
            for row, value in zip(
                rows, many(architectures) if many else map(cost, architectures), strict=True
            ):
                row[name] = float(value)
        return rows

    def values(self, measured: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
        """All values of a candidate, in one mapping of plain floats."""
        if not isinstance(measured, Mapping):
            raise TypeError(
                "search: evaluate must return a mapping of names to numbers, as {'accuracy': 0.9}, "
                f"got {measured!r}."
            )
        for name in measured:
            if name in costs or name in self.space or name in self.scalarizations:
                taken = "a choice of the space" if name in self.space else "a cost or a scalarization"
                raise ValueError(
                    f"search: evaluate returned {name!r}, which is also the name of {taken}; rename one."
                )
        for name in self.sources:
            if name not in measured and name not in costs:
                raise ValueError(f"search: evaluate returned no {name!r}. {nearest(name, measured)}")
        try:
            values = {**costs, **{name: float(value) for name, value in measured.items()}}
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"search: evaluate must return plain numbers ({error}), got {measured!r}."
            ) from error
        return {**values, **{name: float(of(values)) for name, of in self.scalarizations.items()}}

    def fault(self, values: Mapping[str, float]) -> str | None:
        """Why a candidate with these values has failed; None if it has not."""
        unusable = [f"{name} is {values[name]}" for name in self.needed if not math.isfinite(values[name])]
        return ", ".join(unusable) or None

    def excess(self, costs: Mapping[str, float]) -> float:
        """How far values are beyond the constraints on costs, relative to the bounds; 0 if all are kept."""
        return self.excess_of(self.analytic, costs)

    @staticmethod
    def excess_of(limits: Iterable[Limit], costs: Mapping[str, float]) -> float:
        """As :meth:`excess`, for some constraints."""
        broken = [limit for limit in limits if not limit.holds(costs[limit.name])]
        return sum(
            max(limit.excess(costs[limit.name]) / (abs(limit.bound) or 1.0), 1e-12) for limit in broken
        )

    def description(self) -> dict[str, Any]:
        """What is written into the study, to know it again."""
        return {
            "space": json.loads(self.space.to_json()),
            "objectives": [[objective.direction, objective.name] for objective in self.objectives],
        }
