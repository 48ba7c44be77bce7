"""A space made to fit one network: limits checked, conditions completed, architectures read as sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from lightning_nas.errors import NoMatchError
from lightning_nas.registry import nearest
from lightning_nas.space import Choice, Depth, SearchSpace, Value
from lightning_nas.supernet.anatomy import Anatomy, Group, Part, Stage
from lightning_nas.supernet.layers import cut_of

__all__ = ["Fit", "fit_space"]


@dataclass(frozen=True)
class Fit:
    """A space that fits a network, and what decides the size of each group in it.

    Args:
        space: with conditions completed.
        sources: for each group the choice that decides its size, or None: it stays whole.
        of: for each group that a ratio decides, the group whose size is multiplied with it.
        whole: the size of every group in the whole network.
        stages: of the network.
    """

    space: SearchSpace
    sources: Mapping[str, str | None]
    of: Mapping[str, str]
    whole: Mapping[str, int]
    stages: tuple[Stage, ...]

    def sizes(self, architecture: Mapping[str, Value]) -> dict[str, int]:
        """Units in use of every group."""
        return {group: int(size) for group, size in self.sizes_at(architecture.__getitem__).items()}

    def sizes_at(self, value: Callable[[str], Any]) -> dict[str, Any]:
        """Units in use of every group, from the value of each choice: a number, or an array of numbers."""
        sizes: dict[str, Any] = dict(self.whole)
        decided = {group: choice for group, choice in self.sources.items() if choice is not None}
        for group, choice in decided.items():
            if group not in self.of:
                sizes[group] = value(choice)
        for group, other in self.of.items():
            sizes[group] = np.rint(value(decided[group]) * sizes[other]).astype(np.int64)
        return sizes

    @cached_property
    def smallest(self) -> dict[str, int]:
        """The smallest size that each group can take, whatever the others are."""
        sizes = self.sizes_at(lambda choice: self.space[choice].values[0])
        return {group: int(size) for group, size in sizes.items()}

    @cached_property
    def droppable(self) -> tuple[int, ...]:
        """Indices of the blocks that some depth leaves out."""
        blocks: list[int] = []
        for first, stage in self._first_blocks:
            if stage.choice in self.space:
                depth = self.space[stage.choice]
                always = set.intersection(*(set(_kept(depth, value)) for value in depth.values))
                blocks += [first + i for i in range(len(stage.blocks)) if i not in always]
        return tuple(blocks)

    def varies(self, part: Part) -> bool:
        """Whether some architecture changes this module."""
        inputs = [] if part.inputs is None else [(part.inputs,)]
        return any(cut_of(axes, self.smallest) is not None for axes in (*part.axes.values(), *inputs)) or any(
            value(self.smallest) != value(self.whole) for value in part.attributes.values()
        )

    def kept(self, architecture: Mapping[str, Value]) -> tuple[int, ...]:
        """Indices of the blocks that run."""
        blocks: list[int] = []
        for first, stage in self._first_blocks:
            blocks += [first + i for i in self.kept_of(stage, architecture)]
        return tuple(blocks)

    def is_whole(self, architecture: Mapping[str, Value]) -> bool:
        """Whether an architecture leaves nothing of the network out."""
        blocks = sum(len(stage.blocks) for stage in self.stages)
        return self.sizes(architecture) == self.whole and len(self.kept(architecture)) == blocks

    def kept_of(self, stage: Stage, architecture: Mapping[str, Value]) -> tuple[int, ...]:
        """Indices, within a stage, of its blocks that run."""
        if stage.choice not in self.space:
            return tuple(range(len(stage.blocks)))
        return _kept(self.space[stage.choice], architecture[stage.choice])

    @cached_property
    def _first_blocks(self) -> tuple[tuple[int, Stage], ...]:
        """Each stage with the index of its first block."""
        first = list(accumulate((len(stage.blocks) for stage in self.stages), initial=0))
        return tuple(zip(first, self.stages, strict=False))


def _kept(depth: Choice, value: Value) -> tuple[int, ...]:
    assert isinstance(depth, Depth)  # fit_space makes it one
    return depth.kept(value)


def fit_space(space: SearchSpace, anatomy: Anatomy, exclude: tuple[str, ...], network: str) -> Fit:
    """Check a space against a network, leave the excluded choices out and complete the conditions on depth.

    Raises:
        ValueError: for a choice the network does not have, or a value beyond it; all faults in one message.
        NoMatchError: for a pattern that excludes nothing.
    """
    depths = {stage.choice: stage for stage in anatomy.stages}
    targets: dict[str, set[str]] = {name: {name} for name in depths}
    for group in anatomy.groups.values():
        for name in group.deciders:
            targets.setdefault(name, {name}).update(group.targets)
    excluded = set(_excluded(exclude, targets))
    left = {choice.name: choice for choice in space if choice.name not in excluded}
    if faults := [fault for choice in space for fault in _faults(choice, anatomy, left)]:
        raise ValueError(f"Supernet: the space does not fit this {network}: {' '.join(faults)}")
    choices = list(left.values())
    if not choices:
        raise ValueError(f"Supernet: exclude={exclude} leaves no choice of {', '.join(space.names)}.")
    choices = [
        Depth(c.name, c.values, c.when) if c.name in depths and not isinstance(c, Depth) else c
        for c in choices
    ]
    by_name = {choice.name: choice for choice in choices}
    fitted = []
    for choice in choices:
        choice = replace(choice, when=tuple((p, v) for p, v in choice.conditions if p not in excluded))
        block = None if choice.name in depths else anatomy.block_of_choice(choice.name)
        depth = None if block is None else by_name.get(anatomy.stage_of(block).choice)
        if (
            block is not None
            and depth is not None
            and all(parent != depth.name for parent, _ in choice.conditions)
        ):
            inside = depths[depth.name].blocks.index(anatomy.blocks[block])
            where = tuple(value for value in depth.values if inside in _kept(depth, value))
            if where != depth.values:
                choice = replace(choice, when=(*choice.conditions, (depth.name, where)))
        fitted.append(choice)
    done = SearchSpace(fitted)
    sources = {group.name: _decider(group, done) for group in anatomy.groups.values()}
    idle = [name for name in done.names if name not in depths and name not in sources.values()]
    if idle:
        raise ValueError(
            f"Supernet: {', '.join(map(repr, idle))} decides about nothing, since other choices of the space "
            "come first: one for a single block before one for all, and absolute sizes before ratios. Leave "
            "one of them out."
        )
    of = {group.name: group.of for group in anatomy.groups.values() if sources[group.name] in group.ratios}
    return Fit(done, sources, of, anatomy.whole, anatomy.stages)


def _decider(group: Group, names: Container[str]) -> str | None:
    return next((name for name in group.deciders if name in names), None)


def _faults(choice: Choice, anatomy: Anatomy, choices: Mapping[str, Choice]) -> Iterable[str]:
    limits = anatomy.limits
    if choice.name in anatomy.ratios:
        yield from _faults_of_ratio(choice, anatomy, choices)
        return
    if choice.name not in limits:
        known = (*limits, *anatomy.ratios)
        yield f"there is no choice {choice.name!r} in it. {nearest(choice.name, known)}"
        return
    for value in choice.values:
        if isinstance(value, bool | str | float) or not 1 <= value <= limits[choice.name]:
            yield f"{choice.name!r} cannot be {value!r}, only an integer from 1 to {limits[choice.name]}."
        elif choice.name in anatomy.centred and (limits[choice.name] - value) % 2:
            yield (
                f"{choice.name!r} cannot be {value!r}: as much must be left out of the {limits[choice.name]} "
                "on either side."
            )
    stage = next((stage for stage in anatomy.stages if stage.choice == choice.name), None)
    if stage is None:
        return
    for value in choice.values:
        if isinstance(value, bool | str | float):
            continue
        kept = choice.kept(value) if isinstance(choice, Depth) else tuple(range(int(value)))
        if kept and kept[-1] >= len(stage.blocks):
            yield (
                f"{choice.name!r} {value!r} keeps block {kept[-1]}, but the last one of the network is "
                f"{len(stage.blocks) - 1}."
            )
        if missing := [i for i in stage.fixed if i not in kept]:
            yield f"{choice.name!r} {value!r} drops block {missing[0]}, which must always run."


def _faults_of_ratio(choice: Choice, anatomy: Anatomy, choices: Mapping[str, Choice]) -> Iterable[str]:
    for value in choice.values:
        if isinstance(value, bool | str) or not 0 < value < math.inf:
            yield f"{choice.name!r} cannot be {value!r}, only a number above 0."
            return
    for group in anatomy.ratios[choice.name]:
        decider = _decider(anatomy.groups[group.of], choices)
        sizes = (anatomy.whole[group.of],) if decider is None else choices[decider].values
        for ratio, size in ((choice.values[0], sizes[0]), (choice.values[-1], sizes[-1])):
            if isinstance(ratio, str) or isinstance(size, str):
                return  # a fault of its own
            if not 1 <= (units := round(ratio * size)) <= group.units:
                yield (
                    f"{choice.name!r} {ratio!r} makes {units} units of {group.of!r} {size}, but "
                    f"{group.name!r} can be from 1 to {group.units}."
                )
                return


def _excluded(patterns: tuple[str, ...], targets: Mapping[str, set[str]]) -> Iterable[str]:
    for pattern in patterns:
        matched = [name for name, modules in targets.items() if any(fnmatchcase(m, pattern) for m in modules)]
        if not matched:
            names = sorted({module for modules in targets.values() for module in modules})
            raise NoMatchError(
                f"Supernet: exclude pattern {pattern!r} matches no elastic module. {nearest(pattern, names)}"
            )
        yield from matched
