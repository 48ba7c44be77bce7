"""How a network is made of units that can be left out: what a family tells about one model, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor, nn

from lightning_nas.space import SearchSpace

__all__ = [
    "Anatomy",
    "Axis",
    "Family",
    "Group",
    "Operation",
    "Part",
    "Segment",
    "Sizes",
    "Stage",
    "axis_length",
]

Sizes: TypeAlias = Mapping[str, Any]
"""Units in use by the name of their group: ints, or integer arrays where many architectures are counted."""


@dataclass(frozen=True)
class Segment:
    """A run of equal units along one dimension of a parameter.

    Args:
        units: how many units the whole network has.
        size: entries a unit (a head of 64 rows: 64).
        group: the group whose size says how many of the units are used; None: always all.
        centred: whether the units used are the middle ones (a kernel's) and not the first ones; as many are
            then left out on either side.
    """

    units: int
    size: int = 1
    group: str | None = None
    centred: bool = False

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
        choices: names of choices that may decide how many are used, from the group's own to the one it shares
            with most others; the first one that the space has does. Empty: always all.
        targets: names of the modules it belongs to, for patterns that exclude.
            The first one tells the block that the group lives in, if it lives in one.
        way_out: (module, parameter) whose columns carry the units' contribution on, from which importance is
            read; None for a group whose order is fixed.
        sizes: those that shares of it are rounded to, ascending (channels in multiples of 8); empty: any.
        ratios: names of choices that decide as well, behind ``choices``: how many units there are for each
            one that ``of`` uses (an MLP of 4 times the width).
        of: that other group, decided by no ratio itself.
    """

    name: str
    units: int
    choices: tuple[str, ...]
    targets: tuple[str, ...]
    way_out: tuple[str, str] | None = None
    sizes: tuple[int, ...] = ()
    ratios: tuple[str, ...] = ()
    of: str = ""

    @property
    def deciders(self) -> tuple[str, ...]:
        """All choices that may decide, the first one first."""
        return (*self.choices, *self.ratios)


@dataclass(frozen=True)
class Part:
    """A module whose parameters, buffers or attributes depend on the architecture.

    Args:
        module: its name within the network; empty for the network itself.
        axes: for each of its parameters and buffers that is sliced, one axis a dimension.
        attributes: plain attributes that follow (``num_heads``), each a function of the sizes.
        inputs: the last dimension of what flows in, for masking; None: of a linear layer or norm the last
            axis of its weight, of other modules not elastic.
        reads: for a tensor that is more than cut, a function of the module, the whole tensor and its cut.
        temporary: parameters that only these functions use; an extracted network has none of them.
    """

    module: str
    axes: Mapping[str, tuple[Axis, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Callable[[Sizes], Any]] = field(default_factory=dict)
    inputs: Axis | None = None
    reads: Mapping[str, Callable[[nn.Module, Tensor, Any], Tensor]] = field(default_factory=dict)
    temporary: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """A product: one multiply-accumulate for each place where its module works, and each entry of its axes.

    Args:
        module: whose work it is; it runs, or not, with its block.
        per: ``"position"`` for a linear layer or convolution (a token, a pixel of its output), ``"pair"`` for
            scores of every token of its input ``(..., tokens, width)`` against every token.
        axes: the other dimensions of the product.
    """

    module: str
    per: Literal["position", "pair"]
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Stage:
    """A run of blocks, equal in the shape of what goes in and out, of which a choice may drop some.

    Args:
        choice: its name: ``"depth"`` where the network is one stage, ``"stages.2.depth"`` of several.
        blocks: names of the modules in the order they run: the children of one container, all of them.
        fixed: indices of blocks that must always run (one that changes the resolution).
        hides_dropped: whether the loop over the container must not meet the blocks that do not run: it takes
            a tuple from each, or records something of each by itself. Elsewhere they give back their input.
    """

    choice: str
    blocks: tuple[str, ...]
    fixed: tuple[int, ...] = ()
    hides_dropped: bool = False


@dataclass(frozen=True)
class Anatomy:
    """Everything the engine must know about one model.

    Args:
        stages: in the order they run.
        groups: by name.
        parts: modules that change with the architecture.
        operations: multiply-accumulates that change with the architecture, all of them.
        branch_ends: the last norm or linear layer of each residual branch; with their weights and biases zero
            every block gives back its input, or what its shortcut makes of it.
    """

    stages: tuple[Stage, ...]
    groups: Mapping[str, Group]
    parts: tuple[Part, ...]
    operations: tuple[Operation, ...]
    branch_ends: tuple[str, ...] = ()

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks of all stages; a block's index is its place here."""
        return tuple(block for stage in self.stages for block in stage.blocks)

    @property
    def whole(self) -> dict[str, int]:
        """The size of every group in the whole network."""
        return {name: group.units for name, group in self.groups.items()}

    @property
    def limits(self) -> dict[str, int]:
        """The largest value that each choice could have in this network; ratios have none of their own."""
        limits = {stage.choice: len(stage.blocks) for stage in self.stages}
        for group in self.groups.values():
            for choice in group.choices:
                limits[choice] = min(group.units, limits.get(choice, group.units))
        return limits

    @property
    def ratios(self) -> dict[str, list[Group]]:
        """The groups that each choice of a ratio may decide about."""
        ratios: dict[str, list[Group]] = {}
        for group in self.groups.values():
            for choice in group.ratios:
                ratios.setdefault(choice, []).append(group)
        return ratios

    @cached_property
    def centred(self) -> frozenset[str]:
        """The choices that leave out as much on either side: those of kernels."""
        axes = (axis for part in self.parts for dims in part.axes.values() for axis in dims)
        groups = {segment.group for axis in axes for segment in axis if segment.centred}
        return frozenset(name for g in groups if g is not None for name in self.groups[g].choices)

    def stage_of(self, block: int) -> Stage:
        """The stage that holds the block with this index."""
        return next(stage for stage in self.stages if self.blocks[block] in stage.blocks)

    def block_of(self, module: str) -> int | None:
        """The index of the block that holds a module; None for one that always runs."""
        while module:
            if module in self._index:
                return self._index[module]
            module = module.rpartition(".")[0]
        return None

    def block_of_choice(self, name: str) -> int | None:
        """The index of the one block that a choice decides about; None if it is about more, or about none."""
        blocks = {self.block_of(group.targets[0]) for group in self.groups.values() if name in group.deciders}
        return blocks.pop() if len(blocks) == 1 else None

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.blocks)}


class Family(Protocol):
    """What an adapter of one kind of network provides; it holds no state of any model.

    Attributes:
        name: of the kind.
        executions: how a subnetwork of it can run, of ``"slice"`` and ``"mask"``.
    """

    name: str
    executions: tuple[str, ...]

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a model.

        Raises:
            UnsupportedError: for a layer inside that cannot be sliced.
        """

    def space(self, model: nn.Module, preset: str, **options: Any) -> SearchSpace:
        """The space that a preset's name stands for in this model, changed by the family's own options."""

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Set what a plain copy records about itself (its config); only the kept blocks are left in it."""

    def unfuse(self, model: nn.Module) -> None:
        """Make attention visible to operation counters, in place."""

    def output(self, model: nn.Module, batch: Any) -> Any:
        """Call the model with one batch of the user's loader."""

    def returns_features(self, model: nn.Module) -> bool:
        """Whether the model has no head, so that its output is no logits."""
