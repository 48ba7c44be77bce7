"""Finds the network to make elastic inside a user's module, and other copies of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn

from lightning_nas.errors import NoMatchError, UnsupportedError
from lightning_nas.supernet import supported_networks, supports
from lightning_nas.supernet.annotation import is_annotated

__all__ = ["copies_of", "find_network", "named_tensors", "network_or_whole"]


def find_network(
    module: LightningModule, name: str | None, where: str, may_be_missing: bool = False
) -> nn.Module | None:
    """The sub-module of this name, or the one supported network in the module.

    Raises:
        NoMatchError: if there is none of this name, or none that is supported; lists the nearest.
        UnsupportedError: if several are supported and none is named.
    """
    names = {child: key for key, child in module.named_modules()}
    if name is not None:
        found = dict(module.named_modules()).get(name)
        if found is not None:
            return getattr(found, "_orig_mod", found)
        if may_be_missing:
            return None
        near = get_close_matches(name, [key for key in names.values() if key], n=3, cutoff=0.3)
        raise NoMatchError(f"{where}: no sub-module {name!r}. Nearest names: {', '.join(near) or 'none'}.")
    supported: list[nn.Module] = []
    for child in module.modules():
        if child is module and is_annotated(module):
            continue  # what holds the marked layers is a network of its own inside
        inside_another = any(child is not other and child in set(other.modules()) for other in supported)
        if supports(child) and not inside_another:
            supported.append(child)
    if len(supported) > 1:
        raise UnsupportedError(
            f"{where}: several networks could be made elastic: "
            f"{', '.join(names[child] for child in supported)}. Name one: network='...'."
        )
    if supported:
        return supported[0]
    if may_be_missing:
        return None
    children = (
        ", ".join(f"{key} ({type(child).__name__})" for key, child in module.named_children()) or "none"
    )
    raise NoMatchError(
        f"{where}: no supported network in {type(module).__name__}; its children are: {children}. "
        f"Supported: {', '.join(supported_networks())}, and networks inside it with layers marked by "
        "nas.elastic."
    )


def network_or_whole(module: LightningModule, name: str | None, where: str) -> nn.Module:
    """The sub-module of this name, or the only child with parameters, or the module itself.

    Raises:
        NoMatchError: if there is none of this name; lists the nearest.
    """
    if name is None:
        children = [child for child in module.children() if any(True for _ in child.parameters())]
        found: nn.Module = children[0] if len(children) == 1 else module
        return getattr(found, "_orig_mod", found)
    network = find_network(module, name, where)
    assert network is not None  # it raises where the name is unknown
    return network


def copies_of(network: nn.Module, module: LightningModule, callbacks: Iterable[Callback]) -> list[nn.Module]:
    """Other networks of the same shape in the module and its callbacks: EMA and SWA averages, teachers.

    A reordering that keeps the network's function keeps theirs too, so whatever has its shape may follow it.
    """
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    roots = [module, *(value for callback in callbacks for value in vars(callback).values())]
    candidates = {
        id(child): child for root in roots if isinstance(root, nn.Module) for child in root.modules()
    }
    return [
        child
        for child in candidates.values()
        if child is not network
        and not hasattr(child, "_orig_mod")
        and _kind(child) == _kind(network)
        and {name: parameter.shape for name, parameter in child.named_parameters()} == shapes
    ]


def named_tensors(
    name: str,
    parameter: Tensor,
    network: nn.Module,
    module: LightningModule,
    callbacks: Iterable[Callback],
) -> list[Tensor]:
    """Tensors that the module or a callback keeps in a dictionary under a parameter's name, in its shape."""
    paths = {child: path for path, child in module.named_modules()}
    keys = {name, f"{paths[network]}.{name}"}
    own = vars(nn.Module()).keys()  # _parameters and the like: the network itself
    kept = [v for owner in (module, *callbacks) for k, v in vars(owner).items() if k not in own]
    return [
        tensor
        for mapping in kept
        if isinstance(mapping, Mapping)
        for key, tensor in mapping.items()
        if key in keys and isinstance(tensor, Tensor) and tensor.shape == parameter.shape
    ]


def _kind(module: nn.Module) -> str:
    """The name of the class, without what elasticity added to it."""
    return type(module).__name__.removeprefix("Elastic")
