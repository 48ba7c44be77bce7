"""Where the outputs of a layer go: read from a symbolic trace of the forward pass, without running it."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.fx import Graph, Node, Tracer
from torch.nn import functional as F

from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet.layers import memo_without_hooks, plain_class

__all__ = ["Flow", "Join", "Units", "ends_at", "refusal", "taken", "trace"]

Join: TypeAlias = tuple[str, str, str]
"""Two layers whose units are the same from some place on, and that place."""


@dataclass(frozen=True)
class Units:
    """The outputs of a layer, somewhere on their way.

    Args:
        layer: its name.
        count: how many.
        dim: the dimension they are in, from the end: -1 behind a linear layer, -3 behind an ``nn.Conv2d``.
        ndim: dimensions of the tensor; None: not known.
        size: entries a unit; None: all pixels of its flattened map.
    """

    layer: str
    count: int
    dim: int = -1
    ndim: int | None = None
    size: int | None = 1


@dataclass
class Flow:
    """Where the outputs of some layers go inside one module.

    Attributes:
        called: those layers that the module calls.
        reads: linear layers, convolutions and norms that units come into, in the order they are called.
        joins: layers whose units come together.
        leaves: layers whose units go on outside, or meet what may come from there, and how.
    """

    called: set[str] = field(default_factory=set)
    reads: dict[str, Units] = field(default_factory=dict)
    joins: list[Join] = field(default_factory=list)
    leaves: dict[str, str] = field(default_factory=dict)


# Modules that do not mix units, or end their way, and the dimensions in which they may get them.
_ANY = (-1, -2, -3, -4)
_MIXING = {nn.Linear: (-1,), nn.Conv1d: (-2,), nn.Conv2d: (-3,), nn.Conv3d: (-4,)}
_NORMS = {
    nn.LayerNorm: (-1,),
    nn.RMSNorm: (-1,),
    nn.BatchNorm1d: (-1, -2),
    nn.BatchNorm2d: (-3,),
    nn.BatchNorm3d: (-4,),
    nn.GroupNorm: (-2, -3, -4),
}
_READERS = {**_MIXING, **_NORMS}
_POOLING_NAMES = {
    f"{kind}_pool{n}d": -n - 1 for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for n in (1, 2, 3)
}
_POOLINGS = {
    getattr(nn, f"{kind}Pool{n}d"): (-n - 1,)
    for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg")
    for n in (1, 2, 3)
}
_POINTWISE = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.ReLU, nn.ReLU6,
    nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.ELU,
    nn.SELU, nn.CELU, nn.LeakyReLU, nn.Softplus, nn.Softsign, nn.LogSigmoid,
)  # fmt: skip
_DIMS: dict[type[nn.Module], tuple[int, ...]] = {
    **_READERS, **_POOLINGS, **dict.fromkeys(_POINTWISE, _ANY)
}  # fmt: skip
_POINTWISE_NAMES = (
    "add", "sub", "mul", "div", "truediv", "pow", "neg", "iadd", "isub", "imul", "itruediv", "add_", "sub_",
    "mul_", "div_", "abs", "square", "sqrt", "rsqrt", "exp", "log", "clamp", "relu", "relu_", "relu6", "gelu",
    "silu", "mish", "tanh", "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "elu", "selu", "celu",
    "leaky_relu", "softplus", "softsign", "logsigmoid", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "contiguous", "clone", "to", "float", "half",
)  # fmt: skip
_NO_DATA = ("shape", "size", "dim", "ndim", "numel", "dtype", "device")
_FUNCTIONS = {
    getattr(place, name): name
    for place in (torch, F, operator)
    for name in (*_POINTWISE_NAMES, *_POOLING_NAMES, "flatten", "mean")
    if hasattr(place, name)
}


def trace(model: nn.Module, scope: str, layers: tuple[tuple[str, int], ...]) -> Flow:
    """Follow the outputs of layers through one module, as it trains and as it evaluates.

    Nothing of the model changes: copies of its modules are traced, with its own weights. Arguments that have
    a default take it. Modules inside that hold none of the layers are looked into only where units go there.

    Args:
        model: the network.
        scope: name of the module to trace; empty: the network.
        layers: names of the layers, and how many outputs each has.

    Raises:
        UnsupportedError: for an operation that mixes the units, or that is not known.
        Exception: what :mod:`torch.fx`, or the module, raises where it cannot be traced.
    """
    prefix = f"{scope}." if scope else ""
    opened = {above for name, _ in layers if name.startswith(prefix) for above in _modules_above(name)}
    while True:
        flow = Flow()
        try:
            for is_training in (True, False):
                root = _copied(model, scope, is_training)
                _Follower(root, prefix, dict(layers), flow).follow(_graph(root, prefix, opened))
        except _ClosedError as closed:
            opened.add(closed.name)
        else:
            return flow


def taken(module: Any, name: str, units: Units) -> Units:
    """Units as a layer with weights for each of them takes them.

    Raises:
        UnsupportedError: for a layer of another kind, or one that cannot do with fewer of them.
    """
    if plain_class(module) not in _READERS:
        raise refusal(units.layer, f"into {name}, a {type(module).__module__}.{type(module).__qualname__}")
    entries, groups = _entries(module), getattr(module, "groups", 1)
    size = units.size or entries // units.count
    if size * units.count != entries:
        raise refusal(units.layer, f"into {name}, which takes {entries} entries")
    if groups not in (1, entries):
        raise refusal(units.layer, f"into {name}, which convolves in groups of {entries // groups} channels")
    if getattr(module, "num_groups", 1) > 1:
        raise refusal(units.layer, f"into {name}, a norm over groups of channels")
    return replace(units, size=size)


def ends_at(module: Any) -> bool:
    """Whether a layer mixes all units: linear ones and convolutions do, norms and depthwise ones do not."""
    return plain_class(module) in _MIXING and getattr(module, "groups", 1) == 1


def refusal(layer: str, where: str) -> UnsupportedError:
    """The error for a layer whose outputs go where they cannot be followed."""
    return UnsupportedError(
        f"elastic: the outputs of {layer} go {where}, and how the network runs with fewer of them is not "
        "known. They may pass activations, dropout, pooling, batch and layer norms, depthwise convolutions, "
        "and sums and products with layers marked with the same Choice, until linear layers or convolutions "
        "read them. Mark another layer, name what reads them with into=, or describe the network as a family "
        "(docs/add-a-family.md)."
    )


class _ClosedError(Exception):
    """Units go into a module that is not looked into yet."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Follower:
    """Follows units through one graph, and adds to a flow."""

    def __init__(self, root: nn.Module, prefix: str, layers: Mapping[str, int], flow: Flow) -> None:
        self.root, self.prefix, self.layers, self.flow = root, prefix, layers, flow
        self.here = prefix.rstrip(".") or "the network"
        self.units: dict[Node, Units] = {}

    def follow(self, graph: Graph) -> None:
        calls: list[tuple[Node, str]] = []
        owners: list[str] = []  # modules whose weights are used without calling them
        for node in graph.nodes:
            if node.op == "get_attr":
                owners.append(f"{self.prefix}{node.target}".rpartition(".")[0])
            carried = self._carried(node)
            after: Units | None = None
            if node.op != "call_module":
                after = self._operation(node, carried[0]) if carried else None
            else:
                module, name = self.root.get_submodule(node.target), f"{self.prefix}{node.target}"
                calls.append((node, name))
                if carried:
                    after = self._module(module, name, carried[0])
                if name in self.layers:
                    self.flow.called.add(name)
                    dim = _DIMS[plain_class(module)][0]
                    after = Units(name, self.layers[name], dim, None if dim == -1 else 1 - dim)
            if after is not None:
                self.units[node] = after
        for name in owners:
            if name in self.layers or name in self.flow.reads:
                layer = name if name in self.layers else self.flow.reads[name].layer
                raise refusal(layer, f"where {self.here} uses the weight of {name} by itself")
        for node, name in calls:
            if name in self.flow.reads and not self._carried(node):
                raise refusal(self.flow.reads[name].layer, f"into {name}, which is called without them too")

    def _carried(self, node: Node) -> list[Units]:
        return [self.units[source] for source in node.all_input_nodes if source in self.units]

    def _module(self, module: Any, name: str, units: Units) -> Units | None:
        kind = plain_class(module)
        if kind is nn.Flatten:
            return _flattened(units, module.start_dim, module.end_dim, name)
        if kind not in _DIMS and not (kind is nn.PReLU and module.num_parameters == 1):
            if kind.__module__.startswith("torch.nn") and kind is not nn.Sequential:
                raise refusal(units.layer, f"into {name}, a {kind.__module__}.{kind.__qualname__}")
            raise _ClosedError(name)
        if units.dim not in _DIMS.get(kind, _ANY):
            raise refusal(units.layer, f"into {name}, a {kind.__name__}, in dimension {units.dim}")
        if kind not in _READERS:
            return units
        units = taken(module, name, units)
        self._join(self.flow.reads.setdefault(name, units), units, name)
        if ends_at(module):
            return None
        return units if kind in _NORMS else replace(units, size=module.out_channels // units.count)

    def _operation(self, node: Node, units: Units) -> Units | None:
        """A function, a method, or the end of the module."""
        name: Any = node.target if node.op == "call_method" else _FUNCTIONS.get(node.target)
        if node.op == "output":
            self.flow.leaves.update((u.layer, f"out of {self.here}") for u in self._carried(node))
            return None
        if name in _NO_DATA or (node.target is getattr and node.args[1] in _NO_DATA):
            return None
        if name in _POINTWISE_NAMES:
            return self._pointwise(node, units, f"{name} in {self.here}")
        if _POOLING_NAMES.get(name) == units.dim:
            return units
        if name == "flatten":
            given = _arguments(node, "start_dim", "end_dim")
            return _flattened(units, given.get("start_dim", 0), given.get("end_dim", -1), self.here)
        if name in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1:
            return _flattened(units, 1, -1, self.here)
        if name == "mean":
            return _averaged(units, self.here, **_arguments(node, "dim", "keepdim"))
        raise refusal(units.layer, f"into {getattr(node.target, '__name__', node.target)} in {self.here}")

    def _pointwise(self, node: Node, units: Units, place: str) -> Units | None:
        for source in node.all_input_nodes:
            other = self.units.get(source)
            if other is None and not self._is_single(source):
                self.flow.leaves[units.layer] = f"into {place}, together with another tensor ({source})"
                return None
            if other is not None:
                if (other.dim, other.size) != (units.dim, units.size):
                    raise refusal(
                        units.layer, f"into {place}, where those of {other.layer} have another dimension"
                    )
                self._join(units, other, place)
        return units

    def _is_single(self, node: Node) -> bool:
        """Whether a node is a parameter or buffer of one entry."""
        tensor = operator.attrgetter(str(node.target))(self.root) if node.op == "get_attr" else None
        return isinstance(tensor, torch.Tensor) and tensor.numel() == 1

    def _join(self, units: Units, other: Units, place: str) -> None:
        if units.layer != other.layer:
            self.flow.joins.append((units.layer, other.layer, place))


def _flattened(units: Units, start: Any, end: Any, place: str) -> Units:
    """All dimensions but the batch's become one; a unit's entries stay neighbours."""
    if units.ndim is None or units.dim != 1 - units.ndim or (start, end) != (1, -1):
        raise refusal(units.layer, f"into flatten or view in {place}, which mixes them")
    return replace(units, dim=-1, ndim=2, size=units.size if units.ndim == 2 else None)


def _averaged(units: Units, place: str, dim: Any = None, keepdim: bool = False, **_: Any) -> Units:
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, tuple | list) or (units.ndim is None and max(dims) >= 0):
        raise refusal(units.layer, f"into mean in {place}; name its dimensions, from the end (dim=-2)")
    gone = {d if d < 0 else d - (units.ndim or 0) for d in dims}
    if units.dim in gone:
        raise refusal(units.layer, f"into mean in {place}, which mixes them")
    if keepdim:
        return units
    ndim = None if units.ndim is None else units.ndim - len(gone)
    return replace(units, dim=units.dim + sum(d > units.dim for d in gone), ndim=ndim)


def _arguments(node: Node, *names: str) -> dict[str, Any]:
    """The arguments of a function or method behind its tensor, by name."""
    return {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}


def _entries(module: Any) -> int:
    """How many features or channels come into a layer; of a norm over several dimensions, their product."""
    for name in ("in_features", "in_channels", "num_features", "num_channels"):
        if hasattr(module, name):
            return int(getattr(module, name))
    return math.prod(module.normalized_shape)


class _Tracer(Tracer):
    """Looks into modules that are opened, and takes all others as one step."""

    def __init__(self, prefix: str, opened: Iterable[str]) -> None:
        super().__init__()
        self.prefix, self.opened = prefix, opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return f"{self.prefix}{module_qualified_name}" not in self.opened


def _graph(root: nn.Module, prefix: str, opened: Iterable[str]) -> Graph:
    parameters = inspect.signature(type(root).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that defaults are taken for granted
        return _Tracer(prefix, opened).trace(root, concrete_args=defaults or None)


def _copied(model: nn.Module, scope: str, is_training: bool) -> nn.Module:
    """A copy of a module, whose forward pass may change what it likes; it has the weights of the model."""
    memo = {**memo_without_hooks(model), **{id(parameter): parameter for parameter in model.parameters()}}
    root = copy.deepcopy(model.get_submodule(scope), memo)
    for module in root.modules():
        module.training = is_training  # and not root.train(), which a user may have made freeze the weights
    return root


def _modules_above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
