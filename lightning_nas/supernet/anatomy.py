"""How a network is made of units that can be left out: what a family tells about one model, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor, nn

from lightning_nas.space import SearchSpace

__all__ = ["Anatomy", "Axis", "Family", "Group", "Operation", "Part", "Segment", "Sizes", "axis_length"]

Sizes: TypeAlias = Mapping[str, Any]
"""Units in use by the name of their group: ints, or integer arrays where many architectures are counted."""


@dataclass(frozen=True)
class Segment:
    """A run of equal units along one dimension of a parameter.

    Args:
        units: how many units the whole network has.
        size: entries a unit (a head of 64 rows: 64).
        group: the group whose size says how many of the units are used, the first ones; None: always all.
    """

    units: int
    size: int = 1
    group: str | None = None

    def used(self, sizes: Sizes) -> Any:  # int or array, as the sizes are
        """Entries in use."""
        return self.size * (self.units if self.group is None else sizes[self.group])


Axis: TypeAlias = tuple[Segment, ...]
"""One dimension of a parameter, from its first entry to its last."""


def axis_length(axis: Axis, sizes: Sizes) -> Any:  # int or array, as the sizes are
    """Entries of a dimension that are used."""
    return sum(segment.used(sizes) for segment in axis)


@dataclass(frozen=True)
class Group:
    """Units that are used, left out and reordered together: the heads of one attention, the units of one MLP.

    Args:
        name: unique within the network (``"layers.3.heads"``).
        units: how many the whole network has.
        choices: names of choices that may decide how many are used; the first one that the space has does.
        targets: names of the modules it belongs to, for patterns that exclude.
        way_out: (module, parameter) whose columns carry the units' contribution on, from which importance is
            read; None for a group whose order is fixed.
    """

    name: str
    units: int
    choices: tuple[str, ...]
    targets: tuple[str, ...]
    way_out: tuple[str, str] | None = None


@dataclass(frozen=True)
class Part:
    """A module whose parameters or attributes depend on the architecture.

    Args:
        module: its name within the network; empty for the network itself.
        axes: for each of its parameters that is sliced, one axis a dimension.
        attributes: plain attributes that follow (``num_heads``), each a function of the sizes.
    """

    module: str
    axes: Mapping[str, tuple[Axis, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Callable[[Sizes], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """A product inside a block: one multiply-accumulate for each token (or pair of tokens) and entry.

    Args:
        block: index of the block it belongs to.
        per: ``"token"`` for a linear layer, ``"pair"`` for scores of every token against every token.
        axes: the other dimensions of the product.
    """

    block: int
    per: Literal["token", "pair"]
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Anatomy:
    """Everything the engine must know about one model.

    Args:
        blocks: names of the modules that the choice ``"depth"`` may drop, in the order they run.
        groups: by name.
        parts: modules that change with the architecture.
        operations: multiply-accumulates inside the blocks, all of them.
    """

    blocks: tuple[str, ...]
    groups: Mapping[str, Group]
    parts: tuple[Part, ...]
    operations: tuple[Operation, ...]

    @property
    def whole(self) -> dict[str, int]:
        """The size of every group in the whole network."""
        return {name: group.units for name, group in self.groups.items()}

    @property
    def limits(self) -> dict[str, int]:
        """The largest value that each choice could have in this network."""
        limits = {"depth": len(self.blocks)}
        for group in self.groups.values():
            for choice in group.choices:
                limits[choice] = min(group.units, limits.get(choice, group.units))
        return limits

    def block_of(self, module: str) -> int | None:
        """The index of the block that holds a module; None for one that always runs."""
        for i, block in enumerate(self.blocks):
            if module == block or module.startswith(f"{block}."):
                return i
        return None


class Family(Protocol):
    """What an adapter of one kind of network provides; it holds no state of any model."""

    name: str

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a model.

        Raises:
            UnsupportedError: for a layer inside that cannot be sliced.
        """

    def space(self, model: nn.Module, preset: str, **options: Any) -> SearchSpace:
        """The space that a preset's name stands for in this model, changed by the family's own options."""

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Leave only the kept blocks in a plain copy, and set what else depends on the architecture."""

    def unfuse(self, model: nn.Module) -> None:
        """Make attention visible to operation counters, in place."""

    def output(self, model: nn.Module, batch: Any) -> Any:
        """Call the model with one batch of the user's loader."""

    def tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The ``(batch, tokens, width)`` input of a block, from the arguments it was called with."""
