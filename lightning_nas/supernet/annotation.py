"""Marks that a user puts on layers of his own network: how small they may become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.space import Choice, Depth
from lightning_nas.supernet.layers import plain_class

__all__ = ["Annotation", "annotations_of", "elastic", "erase", "is_annotated"]

M = TypeVar("M", bound=nn.Module)

Options: TypeAlias = "Choice | Sequence[int | float]"

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MARK = "_annotation"  # the attribute of a module that holds it


@dataclass(frozen=True)
class Annotation:
    """What is marked on one module.

    Args:
        kind: ``"out"`` for the outputs of a layer, ``"depth"`` for the blocks of a container.
        values: sizes it may have, ascending; the last one is its own.
        choice: what decides; None: a choice of its own, named after the module.
        into: layers that read the outputs, by names within the module that holds the layer.
        through: norms and depthwise convolutions on the way there.
    """

    kind: Literal["out", "depth"]
    values: tuple[int, ...]
    choice: Choice | None
    into: tuple[str, ...] = ()
    through: tuple[str, ...] = ()

    def choice_of(self, name: str) -> Choice:
        """The choice that decides about the module of this name."""
        return self.choice or Choice(f"{name}.{self.kind}", self.values)


def elastic(
    layer: M,
    *,
    out: Options | None = None,
    depth: Options | None = None,
    into: Sequence[str] = (),
    through: Sequence[str] = (),
) -> M:
    """Mark a layer of your own network as one that may become smaller; it stays the layer it is.

    :class:`~lightning_nas.Supernet` and the callbacks then accept the network. They find out which layers
    follow by tracing the forward pass (:mod:`torch.fx`): activations, dropout, pooling, batch and layer
    norms, depthwise convolutions, sums and products of layers marked with the same choice, down to the linear
    layers and convolutions that read the units. What else the units meet is refused with its name. A network
    of a class that has a family takes its space from there and must not be marked.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = elastic(nn.Linear(8, 32), out=(0.5, 1.0)), nn.Linear(32, 8)
        ...     def forward(self, x):
        ...         return x + self.down(self.up(x).relu())
        >>> from lightning_nas.supernet import Supernet
        >>> Supernet(nn.Sequential(Block(), Block())).space.choices[0]
        Choice(name='0.up.out', values=(16, 32), when=())

    Args:
        layer: ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` for ``out``; for ``depth`` an
            ``nn.Sequential`` or ``nn.ModuleList`` of residual blocks that all give back the shape they take.
        out: how many outputs it may have, its own number among them: ints, or floats in (0, 1] as shares of
            it; or a :class:`~lightning_nas.Choice` of ints. Layers with equal choices share one decision.
        depth: the same for the number of blocks that run. Of a sequence the blocks left out are evenly spaced
            behind the first one; a :class:`~lightning_nas.Depth` says which run, another choice keeps the
            first ones.
        into: where the forward pass cannot be traced, all linear layers and convolutions that read the
            outputs, by their names within the module that holds the layer (``("down",)``). It is believed.
        through: with ``into``, the norms and depthwise convolutions that the outputs pass.

    Returns:
        The layer.

    Raises:
        UnsupportedError: for a layer of another class.
        ValueError: for options that do not fit the layer or each other.
    """
    kind: Literal["out", "depth"] = "out" if depth is None else "depth"
    options = out if depth is None else depth
    if options is None or (out is not None and depth is not None):
        raise ValueError(f"elastic: give out=... or depth=..., one of them, got {out=} and {depth=}.")
    if (kind == "depth" and into) or (through and not into):
        raise ValueError(
            f"elastic: into= names what reads the outputs of one layer, and through= what lies between; got "
            f"{into=} and {through=} with {kind}=."
        )
    choice = options if isinstance(options, Choice) else None
    values = _sizes(options, _whole(layer, kind), kind)
    names = [(name,) if isinstance(name, str) else tuple(name) for name in (into, through)]
    setattr(layer, _MARK, Annotation(kind, values, choice, *names))
    return layer


def annotations_of(model: nn.Module) -> dict[str, Annotation]:
    """What is marked inside a network, by the names of the modules; not what is marked on itself."""
    marks = {name: getattr(module, _MARK, None) for name, module in model.named_modules() if name}
    return {name: mark for name, mark in marks.items() if isinstance(mark, Annotation)}


def is_annotated(model: nn.Module) -> bool:
    """Whether a network holds marked layers; a container that is never called is no network."""
    return type(model).forward is not nn.Module.forward and bool(annotations_of(model))


def erase(model: nn.Module) -> None:
    """Take all marks off a network."""
    for module in model.modules():
        vars(module).pop(_MARK, None)


def _whole(layer: Any, kind: str) -> int:
    if kind == "out" and plain_class(layer) in _LAYERS:
        if getattr(layer, "groups", 1) > 1:
            raise UnsupportedError(
                f"elastic: a convolution in {layer.groups} groups cannot leave out single outputs. Mark the "
                "layer in front of it; a depthwise convolution follows."
            )
        return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
    if kind == "depth" and isinstance(layer, nn.Sequential | nn.ModuleList):
        if len(set(layer)) < len(layer):
            raise UnsupportedError(
                f"elastic: a block is several times in this {type(layer).__name__}; depth= needs each block "
                "once. Use copy.deepcopy(block)."
            )
        return len(layer)
    known = [cls.__name__ for cls in (_LAYERS if kind == "out" else (nn.Sequential, nn.ModuleList))]
    raise UnsupportedError(
        f"elastic: {kind}= cannot be chosen of a {type(layer).__module__}.{type(layer).__qualname__}. "
        f"Supported: {', '.join(known)}."
    )


def _sizes(options: Options, whole: int, kind: str) -> tuple[int, ...]:
    named = isinstance(options, Choice)
    values = options.values if isinstance(options, Choice) else tuple(options)
    if isinstance(options, Depth) and kind == "out":
        raise ValueError(f"elastic: {options.name!r} is a Depth; give out= a Choice or a sequence.")
    for value in values:
        is_share = isinstance(value, float) and 0 < value <= 1 and not named
        is_size = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= whole
        if not (is_share or is_size):
            raise ValueError(
                f"elastic: {kind} cannot be {value!r}; give ints from 1 to {whole}, which is all that the "
                f"layer has{'' if named else ', or floats in (0, 1] for shares'}."
            )
    sizes = {max(1, round(v * whole)) if isinstance(v, float) else int(v) for v in values}
    if whole not in sizes:
        raise ValueError(
            f"elastic: the options {tuple(values)} must hold all {whole}: the largest network is yours."
        )
    return tuple(sorted(sizes))
