"""What a study says about its own search, so that a further machine need not be told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_nas._record import IDENTITY
from lightning_nas.errors import NoMatchError, StudyMismatchError
from lightning_nas.objectives import Cost, Maximize, Minimize, Objective, Scalarization, name_of
from lightning_nas.problem import Problem
from lightning_nas.space import SearchSpace
from lightning_nas.strategies import Strategy, strategies

__all__ = ["SETTINGS", "problem_of", "settings_of", "strategy_of"]

SETTINGS = "lightning_nas:search"
"""The attribute of a study that holds the settings of its search."""


def settings_of(
    problem: Problem, strategy: Strategy, budget: int, seed: int, remeasure: int
) -> dict[str, Any]:
    """The settings of a search as plain values; a strategy that is none is written down as its ``repr``."""
    return {
        "objectives": [[o.direction, o.name, o.unit] for o in problem.objectives],
        "constraints": [[limit.name, limit.operator, limit.bound] for limit in problem.limits],
        "given": [*problem.costs, *problem.scalarizations],
        "strategy": _described(strategy),
        "budget": budget,
        "seed": seed,
        "remeasure": remeasure,
    }


def problem_of(attributes: Mapping[str, Any], costs: Iterable[Cost | Scalarization], where: str) -> Problem:
    """The problem that a study's attributes describe.

    Args:
        attributes: of the study.
        costs: the objects among its objectives and constraints, which cannot be stored.
        where: the study, for messages.

    Raises:
        NoMatchError: if one of them is not given, or one is that the study does not know.
    """
    settings = attributes[SETTINGS]
    given = {name_of(cost, "join: costs"): cost for cost in costs}
    parts = {name_of(p, "join") for c in given.values() if isinstance(c, Scalarization) for p in c.parts}
    missing = [name for name in settings["given"] if name not in given and name not in parts]
    unknown = [name for name in given if name not in settings["given"]]
    if missing or unknown:
        wanted = ", ".join(map(repr, settings["given"])) or "none"
        raise NoMatchError(
            f"join: {where} counts with objects that it cannot store: {wanted}; costs has "
            f"{', '.join(map(repr, given)) or 'none'}. Give costs=[...] with those of the search itself."
        )
    objectives: list[Objective] = []
    for direction, name, unit in settings["objectives"]:
        objective: type[Objective] = Maximize if direction == "maximize" else Minimize
        objectives.append(objective(given[name]) if name in given else objective(name, unit))
    constraints = {given.get(name, name): (holds, bound) for name, holds, bound in settings["constraints"]}
    space = SearchSpace.from_json(json.dumps(attributes[IDENTITY]["space"]))
    return Problem.checked(space, objectives, constraints)


def strategy_of(settings: Mapping[str, Any], where: str) -> Strategy:
    """The strategy that a study was begun with.

    Raises:
        StudyMismatchError: if it is not one that can be made from its name.
    """
    stored = settings["strategy"]
    if isinstance(stored, str) or stored["name"] not in strategies:
        known = stored if isinstance(stored, str) else repr(stored["name"])
        raise StudyMismatchError(
            f"join: {where} is searched by {known}, which is no registered strategy here. Give strategy=, or "
            "import the module that registers it."
        )
    return strategies[stored["name"]](**stored["fields"])


def _described(strategy: Strategy) -> dict[str, Any] | str:
    name = next((name for name in strategies if strategies[name] is type(strategy)), None)
    if name is None or not dataclasses.is_dataclass(strategy):
        return repr(strategy)
    fields = {f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy) if f.init}
    try:
        is_plain = json.loads(json.dumps(fields)) == fields
    except TypeError:
        is_plain = False
    return {"name": name, "fields": fields} if is_plain else repr(strategy)
