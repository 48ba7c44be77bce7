"""A space made to fit one network: limits checked, conditions completed, architectures read as sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate

from lightning_nas.errors import NoMatchError
from lightning_nas.registry import nearest
from lightning_nas.space import Choice, Depth, SearchSpace, Value
from lightning_nas.supernet.anatomy import Anatomy, Part, Stage
from lightning_nas.supernet.layers import cut_of

__all__ = ["Fit", "fit_space"]


@dataclass(frozen=True)
class Fit:
    """A space that fits a network, and what decides the size of each group in it.

    Args:
        space: with conditions completed.
        sources: for each group the choice that decides its size, or None: it stays whole.
        whole: the size of every group in the whole network.
        stages: of the network.
    """

    space: SearchSpace
    sources: Mapping[str, str | None]
    whole: Mapping[str, int]
    stages: tuple[Stage, ...]

    def sizes(self, architecture: Mapping[str, Value]) -> dict[str, int]:
        """Units in use of every group."""
        return {
            group: self.whole[group] if choice is None else int(architecture[choice])
            for group, choice in self.sources.items()
        }

    @cached_property
    def smallest(self) -> dict[str, int]:
        """The smallest size that each group can take, whatever the others are."""
        return {
            group: self.whole[group] if choice is None else int(self.space[choice].values[0])
            for group, choice in self.sources.items()
        }

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
    faults = [fault for choice in space for fault in _faults(choice, anatomy)]
    if faults:
        raise ValueError(f"Supernet: the space does not fit this {network}: {' '.join(faults)}")
    depths = {stage.choice: stage for stage in anatomy.stages}
    targets: dict[str, set[str]] = {name: {name} for name in depths}
    for group in anatomy.groups.values():
        for name in group.choices:
            targets.setdefault(name, {name}).update(group.targets)
    excluded = set(_excluded(exclude, targets))
    choices = [choice for choice in space if choice.name not in excluded]
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
    sources = {
        group.name: next((name for name in group.choices if name in done), None)
        for group in anatomy.groups.values()
    }
    return Fit(done, sources, anatomy.whole, anatomy.stages)


def _faults(choice: Choice, anatomy: Anatomy) -> Iterable[str]:
    limits = anatomy.limits
    if choice.name not in limits:
        yield f"there is no choice {choice.name!r} in it. {nearest(choice.name, limits)}"
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


def _excluded(patterns: tuple[str, ...], targets: Mapping[str, set[str]]) -> Iterable[str]:
    for pattern in patterns:
        matched = [name for name, modules in targets.items() if any(fnmatchcase(m, pattern) for m in modules)]
        if not matched:
            names = sorted({module for modules in targets.values() for module in modules})
            raise NoMatchError(
                f"Supernet: exclude pattern {pattern!r} matches no elastic module. {nearest(pattern, names)}"
            )
        yield from matched
