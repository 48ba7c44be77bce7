"""What an adapter of a family starts from: reading a model into its anatomy, and spaces by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from lightning_nas.supernet.kernels import matrices_of, read_transformed
from lightning_nas.supernet.layers import plain_class
from lightning_nas.supernet.spaces import kind_of, relative_space
from lightning_nas.supernet.statistics import BUFFERS

__all__ = ["QUARTERS", "Adapter", "Preset", "Reader", "length", "multiples", "shape_of"]

QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Preset:
    """A space of absolute values, from a paper, for one size of network.

    Args:
        limits: the largest value that some choices must have in the network (``{"depth": 12, "heads": 12}``).
        options: of :func:`~lightning_nas.supernet.spaces.relative_space`, or what gives them for a network.
    """

    limits: Mapping[str, int]
    options: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]


class Adapter:
    """A family as most are: its default space, presets by name, and nothing special about its blocks."""

    name: str
    executions: tuple[str, ...] = ("slice", "mask")
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
            kinds = {kind_of(name) for name in anatomy.limits}
            for group in anatomy.groups.values():
                if any(options.get(kind_of(ratio)) for ratio in group.ratios):
                    kinds -= {kind_of(name) for name in group.choices}
            default = {kind: shares for kind, shares in self.default.items() if kind in kinds}
            return relative_space(anatomy, **{**default, **options})
        if preset not in self.presets:
            raise ValueError(f"Unknown space {preset!r}. {nearest(preset, ('relative', *self.presets))}")
        chosen = self.presets[preset]
        own = {name: anatomy.limits.get(name, 0) for name in chosen.limits}
        if own != dict(chosen.limits):
            ways = dict.fromkeys(map(kind_of, chosen.limits))
            raise ValueError(
                f"The space {preset!r} is for a network with {_listed(chosen.limits)}; this one has "
                f"{_listed(own)}. Use space='relative' or nas.supernet.default_space(model, "
                f"{', '.join(f'{kind}=...' for kind in ways)})."
            )
        preset_options = chosen.options(model) if callable(chosen.options) else chosen.options
        return relative_space(anatomy, **{**preset_options, **options})

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
        self.branch_ends: list[str] = []

    def anatomy(self) -> Anatomy:
        """What was collected."""
        parts, operations = tuple(self.parts.values()), tuple(self.operations)
        return Anatomy(tuple(self.stages), self.groups, parts, operations, tuple(self.branch_ends))

    def stage(
        self,
        container: str,
        choice: str = "depth",
        fixed: tuple[int, ...] = (),
        hides_dropped: bool = False,
    ) -> tuple[str, ...]:
        """All children of a container are blocks of one stage; returns their names."""
        names = tuple(
            f"{container}.{name}" for name, _ in self.model.get_submodule(container).named_children()
        )
        self.stages.append(Stage(choice, names, fixed, hides_dropped))
        return names

    def group(
        self,
        name: str,
        units: int,
        choices: tuple[str, ...],
        targets: tuple[str, ...],
        way_out: str | None = None,
        sizes: tuple[int, ...] = (),
        ratios: tuple[str, ...] = (),
        of: str = "",
    ) -> str:
        """Units that are used together, see :class:`Group`; ``way_out``: the module whose weight it is."""
        leaves = None if way_out is None else (way_out, "weight")
        self.groups[name] = Group(name, units, choices, targets, leaves, sizes, ratios, of)
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
        self.parts[module] = replace(
            before,
            axes={**before.axes, **present},
            attributes={**before.attributes, **(attributes or {})},
            inputs=inputs or before.inputs,
        )

    def operation(self, module: str, per: Literal["position", "pair"], *axes: Axis) -> None:
        """Multiply-accumulates of a module."""
        self.operations.append(Operation(module, per, axes))

    def linear(self, name: str, rows: Axis, columns: Axis) -> None:
        """A linear layer: rows are its outputs, columns its inputs."""
        self.known(name, (nn.Linear,), "linear layer")
        self.part(
            name,
            {"weight": (rows, columns), "bias": (rows,), **_scales(rows, columns)},
            {"out_features": length(rows), "in_features": length(columns)},
        )
        self.operation(name, "position", rows, columns)

    def norm(self, name: str, axis: Axis, classes: tuple[type, ...] = (nn.LayerNorm,)) -> None:
        """A layer or RMS norm over an axis."""
        self.known(name, classes, "norm")
        attributes = {"normalized_shape": shape_of(axis)} if self.has(name, "normalized_shape") else {}
        self.part(name, {"weight": (axis,), "bias": (axis,)}, attributes)

    def convolution(
        self,
        name: str,
        rows: Axis,
        columns: Axis,
        kernel: str | None = None,
        classes: tuple[type, ...] = (nn.Conv2d,),
    ) -> None:
        """A convolution: rows are its output channels, columns its input channels.

        Args:
            name: of the module.
            rows: output channels.
            columns: input channels; of a grouped convolution a unit of them is one group, or several.
            kernel: the group of its kernel size, the centre of the whole one; padding follows. None: whole.
            classes: those that may convolve here.
        """
        conv = self.known(name, classes, "convolution")
        per_group = conv.in_channels // conv.groups
        elastic = [segment for segment in (*rows, *columns) if segment.group is not None]
        follow = {segment.group for segment in rows} == {segment.group for segment in columns}
        if conv.groups > 1 and elastic and (not follow or any(s.size % per_group for s in elastic)):
            raise UnsupportedError(
                f"Supernet: {name} convolves in {conv.groups} groups of {per_group} channels, and its "
                "channels cannot be left out one by one."
            )
        inputs = columns if conv.groups == 1 else (Segment(per_group),)
        sides = tuple((Segment(size, 1, kernel, centred=True),) for size in conv.kernel_size)
        attributes: dict[str, Any] = {"out_channels": length(rows), "in_channels": length(columns)}
        if conv.groups > 1:
            attributes["groups"] = partial(_groups, columns, per_group)
        if kernel is not None:
            attributes |= {"kernel_size": partial(_kernel_size, sides)}
            if any(conv.padding) and not isinstance(conv.padding, str):
                pads = (sides, conv.kernel_size, conv.padding, conv.dilation)
                attributes["padding"] = partial(_padding, *pads)
                attributes["_reversed_padding_repeated_twice"] = partial(_padding_of_edges, *pads)
        axes = {"weight": (rows, inputs, *sides), "bias": (rows,), **_scales(rows, columns)}
        self.part(name, axes, attributes)
        if kernel is not None and (matrices := matrices_of(conv)):
            self.parts[name] = replace(
                self.parts[name], reads={"weight": read_transformed}, temporary=tuple(matrices)
            )
        self.operation(name, "position", rows, inputs, *sides)

    def batch_norm(
        self,
        name: str,
        axis: Axis,
        classes: tuple[type, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    ) -> None:
        """A batch norm over channels."""
        self.known(name, classes, "norm")
        own = dict.fromkeys(BUFFERS[:2], (axis,))
        self.part(name, {"weight": (axis,), "bias": (axis,), **own}, {"num_features": length(axis)})

    def embedding(self, name: str, width: Axis) -> None:
        """A table of rows, one each for a token, a position, a type."""
        self.known(name, (nn.Embedding,), "embedding")
        rows = (Segment(self.model.get_submodule(name).num_embeddings),)
        axes = {"weight": (rows, width), **_scales(rows, width)}
        self.part(name, axes, {"embedding_dim": length(width)})

    def has(self, module: str, attribute: str) -> bool:
        """Whether a module has an attribute."""
        return hasattr(self.model.get_submodule(module), attribute)

    def known(self, name: str, classes: tuple[type, ...], what: str) -> Any:
        """The module of this name.

        Raises:
            UnsupportedError: if it is of none of these classes; a subclass may compute anything.
        """
        module = self.model.get_submodule(name)
        kind = plain_class(module)
        if kind not in classes or (kind is nn.Linear and "weight" not in module._parameters):
            raise UnsupportedError(
                f"Supernet: {name} is a {type(module).__module__}.{type(module).__qualname__}, a {what} that "
                f"cannot be sliced. Supported: {', '.join(cls.__name__ for cls in classes)}."
            )
        return module


def _scales(rows: Axis, columns: Axis) -> dict[str, tuple[Axis, ...]]:
    """What a binary layer may have learned besides: a scale for each output, a threshold for each input."""
    return {"weight_scale": (rows,), "input_threshold": (columns,)}


def length(axis: Axis) -> Any:
    """The attribute that says how long a dimension is."""
    return partial(axis_length, axis)


def multiples(units: int, of: int) -> tuple[int, ...]:
    """The sizes that are multiples of a number, and the whole."""
    return (*range(of, units, of), units)


def shape_of(axis: Axis) -> Any:
    """The attribute that says so as a shape of one dimension."""
    return partial(_shape, axis)


def _shape(axis: Axis, sizes: Sizes) -> tuple[int, ...]:
    return (int(axis_length(axis, sizes)),)


def _groups(axis: Axis, per_group: int, sizes: Sizes) -> int:
    return int(axis_length(axis, sizes)) // per_group


def _kernel_size(sides: tuple[Axis, ...], sizes: Sizes) -> tuple[int, ...]:
    return tuple(int(axis_length(side, sizes)) for side in sides)


def _padding(
    sides: tuple[Axis, ...],
    whole: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    sizes: Sizes,
) -> tuple[int, ...]:
    """The padding with which the centre of a kernel sees what it saw within the whole kernel."""
    used = _kernel_size(sides, sizes)
    return tuple(p - d * (w - u) // 2 for p, d, w, u in zip(padding, dilation, whole, used, strict=True))


def _padding_of_edges(*whole_and_sizes: Any) -> list[int]:
    """The same as :func:`torch.nn.functional.pad` takes it: the last dimension first, each of its ends."""
    return [padding for padding in reversed(_padding(*whole_and_sizes)) for _ in range(2)]


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
