"""The kinds of networks that can become supernets, found by the class of the model.

Each family is one file, ``<library>_<family>.py``, that registers the classes of its networks. All files of a
library are imported when the first network of that library comes, and none before. A network of no known
class whose layers are marked with :func:`~lightning_nas.elastic` has the family of its marks.
"""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module

from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.registry import Registry, nearest
from lightning_nas.supernet.anatomy import Family
from lightning_nas.supernet.annotation import annotations_of, is_annotated
from lightning_nas.supernet.families._annotated import annotated_family
from lightning_nas.supernet.layers import Elastic

__all__ = ["families", "family_of", "supported_networks", "supports"]

families: Registry[Family] = Registry("network")
"""Full names of network classes to their family; ``families.register("package.Net")(family)`` adds one."""


def supports(model: nn.Module) -> bool:
    """Whether a model's class has a family, or layers in it are marked; a layer may still be refused."""
    return _registered_name(model) is not None or is_annotated(model)


def supported_networks() -> tuple[str, ...]:
    """The full names of the network classes that have a family, of the libraries that are in use."""
    for library in _files_by_library():
        if library in sys.modules:
            _import_families(library)
    return tuple(sorted(families))


def family_of(model: nn.Module) -> Family:
    """The family of a model's class, or of the class of a model library that it extends, or of its marks.

    Raises:
        UnsupportedError: if there is none, naming the nearest supported network; or if there are two, a class
            that is known and marked layers.
    """
    name = _registered_name(model)
    if is_annotated(model):
        if name is None:
            return annotated_family(model)
        raise UnsupportedError(
            f"Supernet: {next(iter(annotations_of(model)))} is marked with nas.elastic, but {name} has a "
            "family of its own, which knows what is elastic in it. Choose with space=, and unmark its layers."
        )
    if name is None:
        known = {full.rpartition(".")[2]: full for full in supported_networks()}
        raise UnsupportedError(
            f"Supernet: {_full_name(type(model))} is not a supported network. "
            f"{nearest(type(model).__name__, known)} Give the network inside your module, mark its layers "
            "with nas.elastic, or add a family with lightning_nas.supernet.families.register."
        )
    return families[name]


def _registered_name(model: nn.Module) -> str | None:
    libraries = _files_by_library()
    for cls in type(model).__mro__:
        if issubclass(cls, Elastic):
            continue
        library = cls.__module__.partition(".")[0]
        if library in libraries:
            _import_families(library)
        if _full_name(cls) in families:
            return _full_name(cls)
        if library in libraries:
            return None  # a library's own variant is another network, a user's subclass his way of calling it
    return None


def _files_by_library() -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            files.setdefault(module.name.partition("_")[0], []).append(module.name)
    return files


def _import_families(library: str) -> None:
    for file in _files_by_library()[library]:
        import_module(f"{__name__}.{file}")


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
