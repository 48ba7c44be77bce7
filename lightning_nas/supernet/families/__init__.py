"""The kinds of networks that can become supernets, found by the class of the model."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.registry import Registry, nearest
from lightning_nas.supernet.anatomy import Family
from lightning_nas.supernet.layers import Elastic

__all__ = ["families", "family_of", "supported_networks", "supports"]

_SHIPPED = {  # class of a network -> module that registers its family, imported when such a network comes
    "timm.models.vision_transformer.VisionTransformer": "lightning_nas.supernet.families.timm_vit",
    "timm.models.deit.VisionTransformerDistilled": "lightning_nas.supernet.families.timm_vit",
}

families: Registry[Family] = Registry("network")
"""Full names of network classes to their family; ``families.register("package.Net")(family)`` adds one."""


def supports(model: nn.Module) -> bool:
    """Whether a model's class has a family; a layer inside may still be refused."""
    return _registered_name(model) is not None


def supported_networks() -> tuple[str, ...]:
    """The full names of the network classes that have a family."""
    return tuple(sorted({*families, *_SHIPPED}))


def family_of(model: nn.Module) -> Family:
    """The family of a model's class, or of the class of a model library that it extends.

    Raises:
        UnsupportedError: if there is none; names the nearest supported network.
    """
    name = _registered_name(model)
    if name is None:
        known = {full.rpartition(".")[2]: full for full in supported_networks()}
        raise UnsupportedError(
            f"Supernet: {_full_name(type(model))} is not a supported network. "
            f"{nearest(type(model).__name__, known)} Give the network inside your module, or add a family "
            "with lightning_nas.supernet.families.register."
        )
    if name not in families:
        import_module(_SHIPPED[name])
    return families[name]


def _registered_name(model: nn.Module) -> str | None:
    for cls in type(model).__mro__:
        if issubclass(cls, Elastic):
            continue
        if _full_name(cls) in {*families, *_SHIPPED}:
            return _full_name(cls)
        if cls.__module__.partition(".")[0] in ("timm", "transformers"):
            return None  # a library's own variant is another network, a user's subclass his way of calling it
    return None


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
