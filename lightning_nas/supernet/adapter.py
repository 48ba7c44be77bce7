"""What an adapter of a family starts from: reading a model into its anatomy, and spaces by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.registry import nearest
from lightning_nas.space import SearchSpace
from lightning_nas.supernet.anatomy import (
    Anatomy,
    Axis,
    Group,
    Operation,
    Part,
    Segment,
    Sizes,
    Stage,
    axis_length,
)
from lightning_nas.supernet.spaces import relative_space
from lightning_nas.supernet.statistics import BUFFERS

__all__ = ["QUARTERS", "Adapter", "Preset", "Reader", "length", "shape_of"]

QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Preset:
    """A space of absolute values, from a paper, for one size of network.

    Args:
        limits: the largest value that some choices must have in the network (``{"depth": 12, "heads": 12}``).
        options: of :func:`~lightning_nas.supernet.spaces.relative_space`.
    """

    limits: Mapping[str, int]
    options: Mapping[str, Any]


class Adapter:
    """A family as most are: its default space, presets by name, and nothing special about its blocks."""

    name: str
    default: ClassVar[Mapping[str, Any]] = {"heads": QUARTERS, "mlp": QUARTERS}
    presets: ClassVar[Mapping[str, Preset]] = {}

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a model."""
        raise NotImplementedError

    def space(self, model: nn.Module, preset: str, **options: Any) -> SearchSpace:
        """A preset: ``"relative"``, or the absolute values of a paper.

        Args:
            model: the network.
            preset: its name.
            **options: of :func:`~lightning_nas.supernet.spaces.relative_space`, in place of the preset's.

        Raises:
            ValueError: for an unknown name, or absolute values that are not this network's.
        """
        anatomy = self.anatomy(model)
        if preset == "relative":
            kinds = {name.rpartition(".")[2] for name in anatomy.limits}
            default = {kind: shares for kind, shares in self.default.items() if kind in kinds}
            return relative_space(anatomy, **{**default, **options})
        if preset not in self.presets:
            raise ValueError(f"Unknown space {preset!r}. {nearest(preset, ('relative', *self.presets))}")
        chosen = self.presets[preset]
        own = {name: anatomy.limits.get(name, 0) for name in chosen.limits}
        if own != dict(chosen.limits):
            raise ValueError(
                f"The space {preset!r} is for a network with {_listed(chosen.limits)}; this one has "
                f"{_listed(own)}. Use space='relative' or nas.supernet.default_space(model, "
                f"{', '.join(f'{name}=...' for name in chosen.limits)})."
            )
        return relative_space(anatomy, **{**chosen.options, **options})

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Nothing is recorded about the network."""

    def unfuse(self, model: nn.Module) -> None:
        """No attention is fused."""

    def output(self, model: nn.Module, batch: Any) -> Any:
        """Of a tuple the network takes the first element; the rest (labels) is the loss's."""
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(batch[0] if isinstance(batch, Sequence) else batch)

    def returns_features(self, model: nn.Module) -> bool:
        """Whether the number of classes is 0, as timm says it."""
        return getattr(model, "num_classes", None) == 0


class Reader:
    """Reads one model into its anatomy: collects stages, groups, parts and operations as it is told of them.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.stages: list[Stage] = []
        self.groups: dict[str, Group] = {}
        self.parts: dict[str, Part] = {}
        self.operations: list[Operation] = []

    def anatomy(self) -> Anatomy:
        """What was collected."""
        return Anatomy(tuple(self.stages), self.groups, tuple(self.parts.values()), tuple(self.operations))

    def stage(self, container: str, choice: str = "depth", fixed: tuple[int, ...] = ()) -> tuple[str, ...]:
        """All children of a container are blocks of one stage; returns their names."""
        names = tuple(
            f"{container}.{name}" for name, _ in self.model.get_submodule(container).named_children()
        )
        self.stages.append(Stage(choice, names, fixed))
        return names

    def group(
        self,
        name: str,
        units: int,
        choices: tuple[str, ...],
        targets: tuple[str, ...],
        way_out: str | None = None,
    ) -> str:
        """Units that are used together, see :class:`Group`; ``way_out``: the module whose weight it is."""
        leaves = None if way_out is None else (way_out, "weight")
        self.groups[name] = Group(name, units, choices, targets, leaves)
        return name

    def part(
        self,
        module: str,
        axes: Mapping[str, tuple[Axis, ...]],
        attributes: Mapping[str, Any] | None = None,
        inputs: Axis | None = None,
    ) -> None:
        """A module that follows the architecture; axes of a tensor that it does not have are left out."""
        owner = self.model.get_submodule(module) if module else self.model
        present = {
            name: axis
            for name, axis in axes.items()
            if owner._parameters.get(name) is not None or owner._buffers.get(name) is not None
        }
        before = self.parts.get(module, Part(module))
        self.parts[module] = Part(
            module,
            {**before.axes, **present},
            {**before.attributes, **(attributes or {})},
            inputs or before.inputs,
        )

    def operation(self, module: str, per: Literal["position", "pair"], *axes: Axis) -> None:
        """Multiply-accumulates of a module."""
        self.operations.append(Operation(module, per, axes))

    def linear(self, name: str, rows: Axis, columns: Axis) -> None:
        """A linear layer: rows are its outputs, columns its inputs."""
        self.known(name, (nn.Linear,), "linear layer")
        self.part(
            name,
            {"weight": (rows, columns), "bias": (rows,)},
            {"out_features": length(rows), "in_features": length(columns)},
        )
        self.operation(name, "position", rows, columns)

    def norm(self, name: str, axis: Axis, classes: tuple[type, ...] = (nn.LayerNorm,)) -> None:
        """A layer or RMS norm over an axis."""
        self.known(name, classes, "norm")
        attributes = {"normalized_shape": shape_of(axis)} if self.has(name, "normalized_shape") else {}
        self.part(name, {"weight": (axis,), "bias": (axis,)}, attributes)

    def batch_norm(self, name: str, axis: Axis) -> None:
        """A batch norm over channels."""
        own = dict.fromkeys(BUFFERS[:2], (axis,))
        self.part(name, {"weight": (axis,), "bias": (axis,), **own}, {"num_features": length(axis)})

    def embedding(self, name: str, width: Axis) -> None:
        """A table of rows, one each for a token, a position, a type."""
        self.known(name, (nn.Embedding,), "embedding")
        rows = (Segment(self.model.get_submodule(name).num_embeddings),)
        self.part(name, {"weight": (rows, width)}, {"embedding_dim": length(width)})

    def has(self, module: str, attribute: str) -> bool:
        """Whether a module has an attribute."""
        return hasattr(self.model.get_submodule(module), attribute)

    def known(self, name: str, classes: tuple[type, ...], what: str) -> Any:
        """The module of this name.

        Raises:
            UnsupportedError: if it is of none of these classes; a subclass may compute anything.
        """
        module = self.model.get_submodule(name)
        if type(module) not in classes or (type(module) is nn.Linear and "weight" not in module._parameters):
            raise UnsupportedError(
                f"Supernet: {name} is a {type(module).__module__}.{type(module).__qualname__}, a {what} that "
                f"cannot be sliced. Supported: {', '.join(cls.__name__ for cls in classes)}."
            )
        return module


def length(axis: Axis) -> Any:
    """The attribute that says how long a dimension is."""
    return partial(axis_length, axis)


def shape_of(axis: Axis) -> Any:
    """The attribute that says so as a shape of one dimension."""
    return partial(_shape, axis)


def _shape(axis: Axis, sizes: Sizes) -> tuple[int, ...]:
    return (int(axis_length(axis, sizes)),)


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
