"""Named finite options, their product under conditions, and one immutable point of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_nas.registry import nearest

__all__ = ["Architecture", "Choice", "Depth", "SearchSpace", "Value"]

Value: TypeAlias = bool | int | float | str
"""What an option may be: a plain value that JSON can write."""

Condition: TypeAlias = tuple[tuple[str, tuple[Value, ...]], ...]


@dataclass(frozen=True)
class Choice:
    """One named decision with finitely many options.

    Args:
        name: unique within a space, dotted by convention (``"layers.3.heads"``).
        values: the options, at least one, without repetition; numbers in ascending order. The last one is
            the *largest*, the first the *smallest*.
        when: the choice is active only while every choice named here has one of the values given for it,
            and is itself active. Empty: always active.

    Raises:
        ValueError: for an empty name, no values, repeated or unsorted values.
        TypeError: for a value that is not a bool, int, float or string.

    Example:
        >>> Choice("layers.5.heads", (1, 2, 3), when={"depth": (6,)})
        Choice(name='layers.5.heads', values=(1, 2, 3), when=(('depth', (6,)),))
    """

    name: str
    values: tuple[Value, ...]
    when: Condition | Mapping[str, Sequence[Value]] = ()

    def __post_init__(self) -> None:
        pairs = self.when.items() if isinstance(self.when, Mapping) else self.when
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "when", tuple((name, tuple(values)) for name, values in pairs))
        if not self.name:
            raise ValueError(f"Choice: a name is needed, got {self.name!r} for the values {self.values}.")
        if not self.values:
            raise ValueError(f"Choice {self.name!r}: at least one value is needed, got none.")
        for value in self.values:
            if not isinstance(value, bool | int | float | str):
                raise TypeError(
                    f"Choice {self.name!r}: a value must be a bool, int, float or str, got {value!r} "
                    f"({type(value).__name__})."
                )
        if len(set(self.values)) < len(self.values):
            raise ValueError(f"Choice {self.name!r}: values repeat in {self.values}; give each one once.")
        numbers = [value for value in self.values if not isinstance(value, str)]
        if numbers and len(numbers) < len(self.values):
            raise ValueError(f"Choice {self.name!r}: numbers and strings cannot be mixed, got {self.values}.")
        if numbers and numbers != sorted(numbers):
            raise ValueError(
                f"Choice {self.name!r}: values must be in ascending order, got {self.values}; "
                f"write {tuple(sorted(numbers))}."
            )

    @property
    def conditions(self) -> Condition:
        """The condition as pairs of a choice's name and the values of it that make this one active."""
        return self.when  # type: ignore[return-value]  # a Mapping becomes pairs in __post_init__


@dataclass(frozen=True)
class Depth(Choice):
    """How many of a network's blocks run, and which.

    Args:
        name: of the choice.
        values: numbers of blocks, ascending.
        when: as in :class:`Choice`.
        keeps: for each value the indices of the blocks that run, ascending. Empty: the first ones.

    Raises:
        ValueError: if a list of kept blocks does not fit its value.

    Example:
        >>> Depth("depth", (2, 3), keeps=((0, 2), (0, 1, 2))).kept(2)
        (0, 2)
    """

    keeps: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keeps", tuple(tuple(int(i) for i in kept) for kept in self.keeps))
        if self.keeps and len(self.keeps) != len(self.values):
            raise ValueError(
                f"Depth {self.name!r}: {len(self.values)} values but {len(self.keeps)} lists in keeps."
            )
        for value, kept in zip(self.values, self.keeps, strict=False):
            if len(kept) != value or list(kept) != sorted(set(kept)) or kept[:1] < (0,):
                raise ValueError(
                    f"Depth {self.name!r}: keeps for {value} must be {value} ascending block indices, "
                    f"got {kept}."
                )

    def kept(self, value: Value) -> tuple[int, ...]:
        """The indices of the blocks that run at depth ``value``."""
        return self.keeps[self.values.index(value)] if self.keeps else tuple(range(int(value)))


class Architecture(Mapping[str, Value]):
    """One immutable point of a search space: the name of each choice and its value.

    Two architectures are equal when all their names and values are. To compare the *networks* they stand
    for, compare their canonical forms (:meth:`SearchSpace.canonical`).

    Example:
        >>> Architecture({"depth": 5, "layers.0.heads": 2}).key
        '{"depth":5,"layers.0.heads":2}'
    """

    __slots__ = ("_hash", "_items")

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._items = {name: _plain(value) for name, value in values.items()}
        self._hash: int | None = None

    def __getitem__(self, name: str) -> Value:
        try:
            return self._items[name]
        except KeyError:
            raise KeyError(_unknown("Architecture", "choice", name, self._items)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._items.items()))
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self._items == other._items if isinstance(other, Architecture) else NotImplemented

    def __repr__(self) -> str:
        return f"Architecture({self._items!r})"

    @property
    def key(self) -> str:
        """A string that is equal for equal architectures, whatever the order of their names."""
        return json.dumps(self._items, sort_keys=True, separators=(",", ":"))

    def to_json(self) -> str:
        """The architecture as JSON text."""
        return json.dumps(self._items)

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: if the text is not a JSON object of plain values.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or not all(
            isinstance(v, bool | int | float | str) for v in values.values()
        ):
            raise ValueError(
                f"Architecture.from_json: expected an object of plain values, got {text[:80]!r}."
            )
        return cls(values)


@dataclass(frozen=True)
class SearchSpace:
    """A product of choices, some of them active only under conditions.

    Args:
        choices: in any order; a condition may name only choices of this space.

    Raises:
        ValueError: for repeated names, a condition on an unknown choice or value, or conditions in a circle.

    Example:
        >>> heads = Choice("layers.1.heads", (2, 4), when={"depth": (2,)})
        >>> space = SearchSpace([Choice("depth", (1, 2)), heads])
        >>> space.size
        3
        >>> space.canonical(space.architecture({"depth": 1, "layers.1.heads": 2})).key
        '{"depth":1,"layers.1.heads":4}'
    """

    choices: tuple[Choice, ...]
    _by_name: dict[str, Choice] = field(init=False, repr=False, compare=False, hash=False)

    def __init__(self, choices: Iterable[Choice]) -> None:
        object.__setattr__(self, "choices", tuple(choices))
        object.__setattr__(self, "_by_name", {choice.name: choice for choice in self.choices})
        if not self.choices:
            raise ValueError("SearchSpace: at least one choice is needed, got none.")
        names = [choice.name for choice in self.choices]
        if len(self._by_name) < len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(
                f"SearchSpace: choices named twice: {', '.join(repeated)}. Names must be unique."
            )
        for choice in self.choices:
            for parent, allowed in choice.conditions:
                where = f"the condition of {choice.name!r}"
                if parent not in self._by_name:
                    raise ValueError(_unknown(f"SearchSpace: {where}", "choice", parent, self._by_name))
                beyond = [value for value in allowed if value not in self._by_name[parent].values]
                if beyond:
                    raise ValueError(
                        f"SearchSpace: {where} needs {parent!r} in {allowed}, but {parent!r} has no value "
                        f"{', '.join(map(repr, beyond))}; its values are {self._by_name[parent].values}."
                    )
        _ = self._parents_first

    # --- reading a space

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Choice:
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(_unknown("SearchSpace", "choice", name, self._by_name)) from None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the choices, in the order given."""
        return tuple(self._by_name)

    @cached_property
    def largest(self) -> Architecture:
        """The architecture with the last value of every choice."""
        return self.canonical(Architecture({c.name: c.values[-1] for c in self.choices}))

    @cached_property
    def smallest(self) -> Architecture:
        """The architecture with the first value of every choice, in canonical form."""
        return self.canonical(Architecture({c.name: c.values[0] for c in self.choices}))

    @cached_property
    def size(self) -> int:
        """How many different networks the space holds: canonical architectures, counted exactly."""
        return math.prod(self._count(component) for component in self._components)

    # --- points

    def architecture(self, values: Mapping[str, Value] | None = None) -> Architecture:
        """The architecture with these values; a choice that is not named takes its largest value.

        Raises:
            ValueError: for an unknown choice, or a value that is not among a choice's options.
        """
        values = dict(values or {})
        for name, value in values.items():
            if name not in self._by_name:
                raise ValueError(_unknown("SearchSpace.architecture", "choice", name, self._by_name))
            if value not in self._by_name[name].values:
                raise ValueError(
                    f"SearchSpace.architecture: {name!r} cannot be {value!r}; "
                    f"allowed are {self._by_name[name].values}."
                )
        return Architecture({c.name: values.get(c.name, c.values[-1]) for c in self.choices})

    def contains(self, architecture: Mapping[str, Value]) -> bool:
        """Whether the architecture names every choice of this space, no other, and only allowed values."""
        return len(architecture) == len(self.choices) and all(
            c.name in architecture and architecture[c.name] in c.values for c in self.choices
        )

    def active(self, architecture: Mapping[str, Value]) -> tuple[str, ...]:
        """The names of the choices that matter in this architecture, in the order of the space."""
        on: set[str] = set()
        for choice in self._parents_first:
            if all(parent in on and architecture[parent] in allowed for parent, allowed in choice.conditions):
                on.add(choice.name)
        return tuple(name for name in self._by_name if name in on)

    def canonical(self, architecture: Mapping[str, Value]) -> Architecture:
        """The same network with every inactive choice at its largest value: equal networks, equal keys.

        Raises:
            ValueError: if the architecture is not one of this space.
        """
        self._check(architecture)
        on = set(self.active(architecture))
        return Architecture(
            {c.name: architecture[c.name] if c.name in on else c.values[-1] for c in self.choices}
        )

    def sample(self, rng: np.random.Generator) -> Architecture:
        """A random architecture in canonical form: each active choice uniform over its options."""
        drawn = {c.name: c.values[int(rng.integers(len(c.values)))] for c in self.choices}
        return self.canonical(drawn)

    def neighbours(self, architecture: Mapping[str, Value]) -> Iterator[Architecture]:
        """Every canonical architecture that differs in the value of exactly one active choice."""
        start = self.canonical(architecture)
        for name in self.active(start):
            for value in self._by_name[name].values:
                if value != start[name]:
                    yield self.canonical({**start, name: value})

    def __str__(self) -> str:
        return f"SearchSpace of {len(self.choices)} choices and {self.size:,} architectures"

    def enumerate(self) -> Iterator[Architecture]:
        """Every canonical architecture once, lazily; meant for small spaces (see :attr:`size`)."""

        def extend(
            chosen: dict[str, Value], on: frozenset[str], rest: Sequence[Choice]
        ) -> Iterator[Architecture]:
            if not rest:
                yield Architecture({name: chosen[name] for name in self._by_name})
                return
            choice = rest[0]
            is_active = all(
                parent in on and chosen[parent] in allowed for parent, allowed in choice.conditions
            )
            for value in choice.values if is_active else choice.values[-1:]:
                yield from extend(
                    {**chosen, choice.name: value}, on | {choice.name} if is_active else on, rest[1:]
                )

        return extend({}, frozenset(), self._parents_first)

    # --- sub-spaces and files

    def restrict(self, values: Mapping[str, Sequence[Value]]) -> SearchSpace:
        """The sub-space in which the named choices keep only the given values.

        Every architecture of the sub-space is one of this space.

        Raises:
            ValueError: for an unknown choice, a value it does not have, or no value.
        """
        for name, kept in values.items():
            if name not in self._by_name:
                raise ValueError(_unknown("SearchSpace.restrict", "choice", name, self._by_name))
            beyond = [value for value in kept if value not in self._by_name[name].values]
            if beyond or not kept:
                raise ValueError(
                    f"SearchSpace.restrict: {name!r} must keep some of {self._by_name[name].values}, "
                    f"got {tuple(kept)}."
                )
        return SearchSpace(self._restricted(choice, values) for choice in self.choices)

    def to_json(self) -> str:
        """The space as JSON text, for :meth:`from_json` and for people to edit."""
        return json.dumps({"choices": [_choice_to_dict(choice) for choice in self.choices]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> SearchSpace:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: if the text is not a search space.
        """
        try:
            rows = json.loads(text)["choices"]
            return cls(Depth(**row) if "keeps" in row else Choice(**row) for row in rows)
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"SearchSpace.from_json: not a search space ({error}): {text[:80]!r}."
            ) from error

    # --- numbers for predictors and costs

    def indices(self, architectures: Iterable[Mapping[str, Value]]) -> NDArray[np.int64]:
        """Positions of the values within their choices, ``(n, choices)``; -1 where a choice is inactive.

        Raises:
            ValueError: if an architecture is not one of this space.
        """
        architectures = list(architectures)
        read = itemgetter(*self._by_name)
        try:
            rows = [
                read(a._items if isinstance(a, Architecture) else a) for a in map(self._named, architectures)
            ]
        except KeyError:
            rows = [read(self._checked(a)) for a in architectures]  # names the fault
        columns = list(zip(*rows, strict=True)) if len(self.choices) > 1 else [tuple(rows)]
        result = np.empty((len(rows), len(self.choices)), dtype=np.int64)
        for j, choice in enumerate(self.choices):
            position = {value: i for i, value in enumerate(choice.values)}
            try:
                result[:, j] = list(map(position.__getitem__, columns[j])) if rows else []
            except KeyError:
                list(map(self._checked, architectures))  # names the fault
        return self._without_inactive(result)

    def at(self, positions: NDArray[np.int64]) -> list[Architecture]:
        """The canonical architectures at positions of values within their choices: undoes :meth:`indices`.

        Args:
            positions: ``(n, choices)``; -1 stands for the largest value.
        """
        rows = self.canonical_positions(positions).tolist()
        values = [choice.values for choice in self.choices]
        names = self.names
        return [
            Architecture({name: own[i] for name, own, i in zip(names, values, row, strict=True)})
            for row in rows
        ]

    def canonical_positions(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same networks with every inactive choice at its largest value, ``(n, choices)``."""
        counts = np.array([len(choice.values) for choice in self.choices])
        index = self._without_inactive(positions.copy())
        return np.where(index < 0, counts - 1, index)

    def _without_inactive(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions in which inactive choices become -1, in place."""
        column = {name: j for j, name in enumerate(self._by_name)}
        for choice in self._parents_first:
            for parent, allowed in choice.conditions:
                kept = [self._by_name[parent].values.index(value) for value in allowed]
                index[~np.isin(index[:, column[parent]], kept), column[choice.name]] = -1
        return index

    def encode(
        self, architectures: Iterable[Mapping[str, Value]], kind: Literal["one-hot", "ordinal"] = "one-hot"
    ) -> NDArray[np.float64]:
        """Features of architectures, with categories taken from the space and never from the data.

        Args:
            architectures: n architectures of this space.
            kind: ``"one-hot"``: one column an option, all zero for an inactive choice; ``"ordinal"``: one
                column a choice, the position of its value counted from 1, and 0 for an inactive choice.

        Returns:
            ``(n, sum of options)`` or ``(n, choices)``; the columns are named by :meth:`feature_names`.

        Raises:
            ValueError: if an architecture is not one of this space, or for an unknown kind.
        """
        return self.encode_positions(self.indices(architectures), kind)

    def encode_positions(
        self, positions: NDArray[np.int64], kind: Literal["one-hot", "ordinal"] = "one-hot"
    ) -> NDArray[np.float64]:
        """As :meth:`encode`, of positions as :meth:`indices` gives them.

        Raises:
            ValueError: for an unknown kind.
        """
        index = self._without_inactive(positions.copy())
        if kind == "ordinal":
            return (index + 1).astype(np.float64)
        if kind != "one-hot":
            raise ValueError(f"SearchSpace.encode: kind must be 'one-hot' or 'ordinal', got {kind!r}.")
        blocks = [
            index[:, j : j + 1] == np.arange(len(choice.values)) for j, choice in enumerate(self.choices)
        ]
        return np.concatenate(blocks, axis=1).astype(np.float64)

    def feature_names(self, kind: Literal["one-hot", "ordinal"] = "one-hot") -> list[str]:
        """The names of the columns of :meth:`encode`."""
        if kind == "ordinal":
            return list(self._by_name)
        return [f"{choice.name}={value}" for choice in self.choices for value in choice.values]

    # --- how it is done

    @cached_property
    def _parents_first(self) -> tuple[Choice, ...]:
        done: dict[str, Choice] = {}
        left = list(self.choices)
        while left:
            ready = [choice for choice in left if all(parent in done for parent, _ in choice.conditions)]
            if not ready:
                raise ValueError(
                    f"SearchSpace: conditions in a circle among {', '.join(c.name for c in left)}."
                )
            done.update((choice.name, choice) for choice in ready)
            left = [choice for choice in left if choice.name not in done]
        return tuple(done.values())

    @cached_property
    def _components(self) -> tuple[tuple[Choice, ...], ...]:
        """Groups of choices that no condition connects: their counts multiply."""
        group = {name: {name} for name in self._by_name}
        for choice in self.choices:
            for parent, _ in choice.conditions:
                if group[parent] is not group[choice.name]:
                    group[parent] |= group[choice.name]
                    for member in group[choice.name]:
                        group[member] = group[parent]
        distinct = {id(members): members for members in group.values()}.values()
        return tuple(tuple(c for c in self._parents_first if c.name in members) for members in distinct)

    def _count(self, component: Sequence[Choice]) -> int:
        """Canonical architectures of one component: walk over the choices that others depend on."""
        controlling = {parent for choice in component for parent, _ in choice.conditions}
        parents = [choice for choice in component if choice.name in controlling]
        leaves = [choice for choice in component if choice.name not in controlling]

        def active(choice: Choice, chosen: Mapping[str, Value]) -> bool:
            return all(
                parent in chosen and chosen[parent] in allowed for parent, allowed in choice.conditions
            )

        def count(chosen: dict[str, Value], rest: Sequence[Choice]) -> int:
            if not rest:
                return math.prod(len(leaf.values) for leaf in leaves if active(leaf, chosen))
            if not active(rest[0], chosen):
                return count(chosen, rest[1:])
            return sum(count({**chosen, rest[0].name: value}, rest[1:]) for value in rest[0].values)

        return count({}, parents)

    def _restricted(self, choice: Choice, values: Mapping[str, Sequence[Value]]) -> Choice:
        kept = tuple(v for v in choice.values if v in values.get(choice.name, choice.values))
        when = tuple(
            (p, tuple(v for v in allowed if v in values.get(p, allowed))) for p, allowed in choice.conditions
        )
        if isinstance(choice, Depth) and choice.keeps:
            return replace(choice, values=kept, when=when, keeps=tuple(choice.kept(v) for v in kept))
        return replace(choice, values=kept, when=when)

    def _named(self, architecture: Mapping[str, Value]) -> Mapping[str, Value]:
        if len(architecture) != len(self.choices):
            self._check(architecture)
        return architecture

    def _checked(self, architecture: Mapping[str, Value]) -> Mapping[str, Value]:
        self._check(architecture)
        return architecture

    def _check(self, architecture: Mapping[str, Value]) -> None:
        for name in architecture:
            if name not in self._by_name:
                raise ValueError(_unknown("SearchSpace", "choice", name, self._by_name))
        for choice in self.choices:
            if choice.name not in architecture:
                raise ValueError(
                    f"SearchSpace: the architecture lacks {choice.name!r}; "
                    "space.architecture({...}) fills what is not named with the largest value."
                )
            if architecture[choice.name] not in choice.values:
                raise ValueError(
                    f"SearchSpace: {choice.name!r} cannot be {architecture[choice.name]!r}; "
                    f"allowed are {choice.values}."
                )


def _choice_to_dict(choice: Choice) -> dict[str, Any]:
    row: dict[str, Any] = {"name": choice.name, "values": choice.values}
    if choice.conditions:
        row["when"] = choice.conditions
    if isinstance(choice, Depth):
        row["keeps"] = choice.keeps
    return row


def _plain(value: Value) -> Value:
    return value.item() if isinstance(value, np.generic) else value


def _unknown(where: str, what: str, name: str, known: Iterable[str]) -> str:
    return f"{where}: unknown {what} {name!r}. {nearest(name, known)}"
