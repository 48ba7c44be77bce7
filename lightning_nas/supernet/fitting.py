"""A space made to fit one network: limits checked, conditions completed, architectures read as sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property

from lightning_nas.errors import NoMatchError
from lightning_nas.registry import nearest
from lightning_nas.space import Choice, Depth, SearchSpace, Value
from lightning_nas.supernet.anatomy import Anatomy, Part
from lightning_nas.supernet.layers import cut_of

__all__ = ["Fit", "fit_space"]


@dataclass(frozen=True)
class Fit:
    """A space that fits a network, and what decides the size of each group in it.

    Args:
        space: with conditions completed.
        sources: for each group the choice that decides its size, or None: it stays whole.
        whole: the size of every group in the whole network.
        blocks: how many blocks the network has.
    """

    space: SearchSpace
    sources: Mapping[str, str | None]
    whole: Mapping[str, int]
    blocks: int

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
        if "depth" not in self.space:
            return ()
        always = set(range(self.blocks))
        for value in self.space["depth"].values:
            always &= set(self.kept({"depth": value}))
        return tuple(i for i in range(self.blocks) if i not in always)

    def varies(self, part: Part) -> bool:
        """Whether some architecture changes this module."""
        return any(cut_of(axes, self.smallest) is not None for axes in part.axes.values()) or any(
            value(self.smallest) != value(self.whole) for value in part.attributes.values()
        )

    def kept(self, architecture: Mapping[str, Value]) -> tuple[int, ...]:
        """Indices of the blocks that run."""
        if "depth" not in self.space:
            return tuple(range(self.blocks))
        depth = self.space["depth"]
        assert isinstance(depth, Depth)
        return depth.kept(architecture["depth"])


def fit_space(space: SearchSpace, anatomy: Anatomy, exclude: tuple[str, ...], network: str) -> Fit:
    """Check a space against a network, leave the excluded choices out and complete the conditions on depth.

    Raises:
        ValueError: for a choice the network does not have, or a value beyond it; all faults in one message.
        NoMatchError: for a pattern that excludes nothing.
    """
    faults = [fault for choice in space for fault in _faults(choice, anatomy)]
    if faults:
        raise ValueError(f"Supernet: the space does not fit this {network}: {' '.join(faults)}")
    targets: dict[str, set[str]] = {"depth": {"depth"}}
    for group in anatomy.groups.values():
        for name in group.choices:
            targets.setdefault(name, {name}).update(group.targets)
    excluded = set(_excluded(exclude, targets))
    choices = [choice for choice in space if choice.name not in excluded]
    if not choices:
        raise ValueError(f"Supernet: exclude={exclude} leaves no choice of {', '.join(space.names)}.")
    depth = next(
        (
            c if isinstance(c, Depth) else Depth(c.name, c.values, c.when)
            for c in choices
            if c.name == "depth"
        ),
        None,
    )
    fitted = []
    for choice in choices:
        choice = replace(choice, when=tuple((p, v) for p, v in choice.conditions if p not in excluded))
        if choice.name == "depth":
            fitted.append(depth or choice)
            continue
        block = _block_of(choice.name)
        if (
            depth is not None
            and block is not None
            and all(parent != "depth" for parent, _ in choice.conditions)
        ):
            where = tuple(value for value in depth.values if block in depth.kept(value))
            if where != depth.values:
                choice = replace(choice, when=(*choice.conditions, ("depth", where)))
        fitted.append(choice)
    done = SearchSpace(fitted)
    sources = {
        group.name: next((name for name in group.choices if name in done), None)
        for group in anatomy.groups.values()
    }
    return Fit(done, sources, anatomy.whole, len(anatomy.blocks))


def _faults(choice: Choice, anatomy: Anatomy) -> Iterable[str]:
    limits = anatomy.limits
    if choice.name not in limits:
        yield f"there is no choice {choice.name!r} in it. {nearest(choice.name, limits)}"
        return
    for value in choice.values:
        if isinstance(value, bool | str | float) or not 1 <= value <= limits[choice.name]:
            yield f"{choice.name!r} cannot be {value!r}, only an integer from 1 to {limits[choice.name]}."
    if isinstance(choice, Depth):
        for value, kept in zip(choice.values, choice.keeps, strict=False):
            if kept and kept[-1] >= len(anatomy.blocks):
                yield (
                    f"'depth' {value!r} keeps block {kept[-1]}, but the last one of the network is "
                    f"{len(anatomy.blocks) - 1}."
                )


def _excluded(patterns: tuple[str, ...], targets: Mapping[str, set[str]]) -> Iterable[str]:
    for pattern in patterns:
        matched = [name for name, modules in targets.items() if any(fnmatchcase(m, pattern) for m in modules)]
        if not matched:
            names = sorted({module for modules in targets.values() for module in modules})
            raise NoMatchError(
                f"Supernet: exclude pattern {pattern!r} matches no elastic module. {nearest(pattern, names)}"
            )
        yield from matched


def _block_of(name: str) -> int | None:
    """The block of a choice named ``layers.<i>.<what>``; None for a choice of the whole network."""
    head, *rest = name.split(".")
    return int(rest[0]) if head == "layers" and rest and rest[0].isdigit() else None
