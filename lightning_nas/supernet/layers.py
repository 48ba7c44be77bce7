"""Elastic layers: the class of a layer is swapped for a subclass that runs on slices of the same weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from lightning_nas.supernet.anatomy import Axis, Sizes

__all__ = [
    "Cut",
    "Elastic",
    "State",
    "codes_weights",
    "cut_of",
    "make_hiding",
    "make_masked",
    "make_plain",
    "make_sliced",
    "mask_of",
    "memo_without_hooks",
    "plain_class",
    "state_of",
    "take",
    "tensor_of",
]

DimCut: TypeAlias = "int | tuple[int, int] | tuple[tuple[int, int], ...] | None"
Cut: TypeAlias = "tuple[DimCut, ...] | None"
"""For each dimension: None, all of it; k, the first k; (p, k), the first k of each of p equal pieces; or
(start, length) pairs. None for all of the tensor."""


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a layer is sliced as: its own, or of a layer that codes its weights the plain one's."""
    kind: type[nn.Module] = getattr(type(module), "float_class", type(module))
    return kind


def codes_weights(module: nn.Module) -> bool:
    """Whether a layer computes with codes of its weights: what is masked would count in its scales."""
    return hasattr(type(module), "float_class")


def cut_of(axes: tuple[Axis, ...], sizes: Sizes) -> Cut:
    """What of a parameter the sizes leave; None if all of it."""
    dims = tuple(_dim_cut(axis, sizes) for axis in axes)
    return None if all(dim is None for dim in dims) else dims


def _dim_cut(axis: Axis, sizes: Sizes) -> DimCut:
    if len(axis) == 1:
        segment = axis[0]
        whole, used = segment.units * segment.size, int(segment.used(sizes))
        if used == whole:
            return None
        return (((whole - used) // 2, used),) if segment.centred else used
    if all(segment.group is None or sizes[segment.group] == segment.units for segment in axis):
        return None
    if axis.count(axis[0]) == len(axis):
        return len(axis), int(axis[0].used(sizes))
    runs, start = [], 0
    for segment in axis:
        runs.append((start, int(segment.used(sizes))))
        start += segment.units * segment.size
    return tuple(runs)


def mask_of(axis: Axis, sizes: Sizes) -> Tensor:
    """The entries in use along one dimension, as a mask of its full length."""
    pieces = []
    for segment in axis:
        piece = torch.zeros(segment.units * segment.size, dtype=torch.bool)
        piece[: segment.used(sizes)] = True
        pieces.append(piece)
    return torch.cat(pieces)


def take(parameter: Tensor, cut: Cut) -> Tensor:
    """The part of a parameter that is in use: a view, or one copy where the part is scattered."""
    scattered = []
    for dim, kept in enumerate(cut or ()):
        if isinstance(kept, int):
            parameter = parameter.narrow(dim, 0, kept)
        elif kept is not None:
            scattered.append((dim, kept))
    for dim, kept in scattered:  # after the views, so that as little as possible is copied
        if isinstance(kept[0], int):
            parameter = (
                parameter.unflatten(dim, (kept[0], -1)).narrow(dim + 1, 0, kept[1]).flatten(dim, dim + 1)
            )
        else:
            pieces = [parameter.narrow(dim, start, length) for start, length in kept]
            parameter = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return parameter


_HOOKS = tuple(
    name for name, value in vars(nn.Module()).items() if "_hooks" in name and isinstance(value, dict)
)


def memo_without_hooks(model: nn.Module) -> dict[int, Any]:
    """A memo for :func:`copy.deepcopy` with which a copy of the model has no hooks."""
    return {
        id(module.__dict__[name]): OrderedDict()
        for module in model.modules()
        for name in _HOOKS
        if name in module.__dict__
    }


class Elastic:
    """Marks a module of a supernet; what is kept on it is in ``_elastic``."""

    _made_by: ClassVar[tuple[Any, ...]]  # the function that makes this class, and its arguments

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, and no import finds it: a pickle holds how it was made.
        return (_blank, self._made_by, *super().__reduce_ex__(protocol)[2:])


def _blank(factory: Callable[..., type[nn.Module]], *arguments: Any) -> nn.Module:
    """A module of a generated class as ``__new__`` leaves it; its state comes from the pickle."""
    cls = factory(*arguments)
    return cls.__new__(cls)


class State:
    """What an elastic module is restricted to, and what it was.

    Args:
        original: the class that the module had.
        attributes: the plain attributes that follow the architecture, as they were.
    """

    def __init__(self, original: type[nn.Module], attributes: dict[str, Any]) -> None:
        self.original, self.attributes = original, attributes
        self.cuts: dict[str, Cut] = {}  # by slicing: what is left of each parameter and buffer
        self.reads: Mapping[str, Callable[[nn.Module, Tensor, Any], Tensor]] = {}  # of those more than cut
        self.values: dict[str, Tensor] = {}  # what is read in place of buffers: a subnetwork's own statistics
        self.watch: Callable[[nn.Module], None] | None = None  # of a batch norm: told when it reads them
        self.is_dropped = False  # by slicing: whether a block returns its input
        # By masking: entries of a layer's input in use, (entries,), or whether a block runs, a scalar; in a
        # mixture with a first dimension more, one row for each part of the batch.
        self.mask: Tensor | None = None
        self.is_mixed = False


def make_sliced(
    module: nn.Module, tensors: tuple[str, ...], attributes: tuple[str, ...], is_block: bool
) -> None:
    """Swap a module's class for one that reads slices of its tensors, and returns its input when dropped."""
    original: Any = type(module)
    state = State(original, {name: getattr(module, name) for name in attributes})
    _become(module, _sliced(original, tensors, is_block), state)


def make_masked(module: nn.Module, is_block: bool) -> None:
    """Swap a module's class for one that masks the input of a layer, or the change that a block makes."""
    original: Any = type(module)
    _become(module, _masked(original, is_block), State(original, {}))


def make_hiding(container: nn.Module) -> None:
    """Swap a container's class for one whose loop over its blocks does not meet the dropped ones."""
    original: Any = type(container)
    _become(container, _hiding(original), State(original, {}))


def make_plain(module: nn.Module) -> None:
    """Give an elastic module its own class and attributes back."""
    if isinstance(module, Elastic):
        state = state_of(module)
        _become(module, state.original, None)
        for name, value in state.attributes.items():
            setattr(module, name, value)


def state_of(module: Any) -> State:
    """What is kept on an elastic module."""
    state: State = module._elastic
    return state


def _become(module: Any, cls: type[nn.Module], state: State | None) -> None:
    module.__class__ = cls
    if state is None:
        del module._elastic
    else:
        module._elastic = state


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer as the whole network has it."""
    parameter = module._parameters.get(name)
    return module._buffers.get(name) if parameter is None else parameter


@cache
def _sliced(original: Any, tensors: tuple[str, ...], is_block: bool) -> type[nn.Module]:
    # Properties, so that the layer's own forward runs: whatever it computes, it computes with the slices.
    members: dict[str, Any] = {name: property(_reader(name)) for name in tensors}
    if is_block:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self._elastic.is_dropped:
                return _first(args, kwargs)
            return original.forward(self, *args, **kwargs)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # a block that does not run calls no hooks
            if self._elastic.is_dropped:
                return _first(args, kwargs)
            return original.__call__(self, *args, **kwargs)

        members |= {"forward": forward, "__call__": call}
    return _subclass(original, members, _sliced, original, tensors, is_block)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a block changes: its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


def _reader(name: str) -> Callable[[Any], Tensor | None]:
    def read(self: Any) -> Tensor | None:
        state = self._elastic
        if state.watch is not None and name == "running_mean":
            state.watch(self)
        tensor = tensor_of(self, name)
        stand_in: Tensor | None = state.values.get(name)
        if tensor is None:
            return None
        if stand_in is not None:
            if (stand_in.device, stand_in.dtype) != (tensor.device, tensor.dtype):
                stand_in = state.values[name] = stand_in.to(tensor)
            return stand_in
        cut = state.cuts.get(name)
        if cut is None:
            return tensor
        return state.reads[name](self, tensor, cut) if name in state.reads else take(tensor, cut)

    return read


@cache
def _hiding(original: Any) -> type[nn.Module]:
    def blocks(self: Any) -> Iterator[nn.Module]:
        for block in original.__iter__(self):
            if not (isinstance(block, Elastic) and state_of(block).is_dropped):
                yield block

    return _subclass(original, {"__iter__": blocks}, _hiding, original)


@cache
def _masked(original: Any, is_block: bool) -> type[nn.Module]:
    is_centred = issubclass(original, nn.LayerNorm)

    def block(self: Any, *args: Any, **kwargs: Any) -> Any:
        x, changed = _first(args, kwargs), original.forward(self, *args, **kwargs)
        if isinstance(changed, tuple):  # the change comes first, then what is recorded on the way
            return (torch.where(_mask(self, x), changed[0], x), *changed[1:])
        return torch.where(_mask(self, x), changed, x)

    def layer(self: Any, x: Tensor) -> Any:
        return original.forward(self, torch.where(_mask(self, x), x, 0.0))

    def norm(self: Any, x: Tensor) -> Any:
        # Both are computed: one graph, and the same bits where the whole width is in use.
        mask, whole = _mask(self, x), original.forward(self, x)
        return torch.where(mask.all(-1, keepdim=True), whole, _masked_norm(self, x, mask, is_centred))

    forward = block if is_block else norm if "Norm" in original.__name__ else layer
    return _subclass(original, {"forward": forward}, _masked, original, is_block)


def _mask(module: Any, x: Tensor) -> Tensor:
    state = module._elastic
    if state.mask.device != x.device:
        state.mask = state.mask.to(x.device)
    mask: Tensor = state.mask
    if state.is_mixed:
        if len(x) % len(mask):
            raise ValueError(
                f"Supernet.mixture: {len(x)} rows cannot be split into {len(mask)} equal parts, one for each "
                "architecture."
            )
        mask = mask.repeat_interleave(len(x) // len(mask), 0)
        mask = mask.view(len(x), *(1,) * (x.ndim - 2), -1)
    return mask


def _masked_norm(norm: Any, x: Tensor, mask: Tensor, is_centred: bool) -> Tensor:
    """Layer or RMS norm over the entries in use; the others become zero."""
    used = torch.where(mask, x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, 0.0)
    count = mask.sum(-1, keepdim=True)
    if is_centred:
        used = torch.where(mask, used - used.sum(-1, keepdim=True) / count, 0.0)
    used = used * torch.rsqrt(used.square().sum(-1, keepdim=True) / count + norm.eps)
    if norm.weight is not None:
        used = used * norm.weight
    if getattr(norm, "bias", None) is not None:
        used = torch.where(mask, used + norm.bias, 0.0)
    return used.to(x.dtype)


def _subclass(original: type[nn.Module], members: dict[str, Any], *made_by: Any) -> type[nn.Module]:
    described = {"__doc__": original.__doc__, "__module__": original.__module__, "_made_by": made_by}
    return type(f"Elastic{original.__name__}", (Elastic, original), {**described, **members})
