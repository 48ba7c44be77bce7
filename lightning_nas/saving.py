"""A network as a folder: safetensors for its weights, JSON for its shape, never a pickle.

What the networks of a library need to be described and rebuilt stands in a file of its own
(``supernet/families/_<library>_saving.py``), found by name and imported when first needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pkgutil
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_nas.binary.codes import LAYOUT
from lightning_nas.binary.frozen import coded_layers, decoded, encoded, freeze, plain_copy
from lightning_nas.errors import SavedFolderError, UnsupportedError
from lightning_nas.registry import Registry

__all__ = ["Description", "SavedFamily", "load", "save", "saved_families", "shared_parameters"]

FORMAT = "lightning-nas network"
FORMAT_VERSION, WITH_CODES = 1, 2  # float networks, and those with binary layers
WEIGHTS, DESCRIPTION = "model.safetensors", "network.json"
_BEING_WRITTEN = ".saving-"
_REBUILD_CODES = (
    "import lightning_nas; model = lightning_nas.load(folder)  # only this package runs its binary layers"
)


@dataclass(frozen=True)
class Description:
    """One network without its weights, as plain data.

    Args:
        network: what :attr:`SavedFamily.build` needs; JSON can write it.
        rebuild: how to load the folder without this package, for a reader of the JSON.
        files: name and text of the files that this takes.
        entries: further entries of the JSON.
        derived: buffers outside of the state dict that :attr:`SavedFamily.build` gives their values.
    """

    network: Mapping[str, Any]
    rebuild: str
    files: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, Any] = field(default_factory=dict)
    derived: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SavedFamily:
    """How one kind of network becomes plain data, and a network again.

    Args:
        networks: which ones, in words, for messages.
        library: the package that they come from.
        supports: whether a module is one of them.
        describe: the module as data, from the module and its :func:`shared_parameters`. Raises
            :class:`UnsupportedError` for what :attr:`build` could not restore.
        build: the module from that data. It is called under ``torch.device("meta")``: weights come later.
        stored_names: the names in the file of those tensors of a module that have another name there.
    """

    networks: str
    library: str
    supports: Callable[[nn.Module], bool]
    describe: Callable[[nn.Module, Mapping[str, str]], Description]
    build: Callable[[Mapping[str, Any]], nn.Module]
    stored_names: Callable[[nn.Module], Mapping[str, str]] = lambda model: {}


saved_families: Registry[SavedFamily] = Registry("family of saved networks")


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    architecture: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Write a plain network to a folder from which :func:`load`, or its library alone, rebuilds it exactly.

    The folder gets ``model.safetensors``, ``network.json``, and what the network's library needs to rebuild
    it alone. Of transformers: ``config.json``, with which the folder is a standard checkpoint, and, where no
    configuration can express the network (fewer heads of the old size, MLP widths that differ),
    ``modeling_subnetwork.py``, to be used with ``trust_remote_code=True``. Of timm: nothing, or, where no
    ``timm.create_model`` call can express the network, ``network.py``.

    A folder that an earlier call wrote is overwritten; other files in it stay. Files are complete before they
    take the place of older ones, and the JSON, which holds a hash of the weights, comes last: an interrupted
    call leaves the old network, or a folder that refuses to load.

    Of binary layers the file has the codes as bits and their scales, and no latent weights: only checkpoints
    have those. ``network.json`` lists the layers and how bits lie, and only :func:`load` reads such a folder.
    The bytes before and after are printed, and are in ``network.json``.

    Args:
        model: a network of a supported family, for example from ``supernet.extract(architecture)``, or one
            that :func:`lightning_nas.binarize` made binary.
        folder: is created; may exist if it is empty or was written by this function.
        architecture: the point of the search space that the network is, to be kept with it.
        metrics: measured values by name, finite numbers or strings, to be kept with it.

    Returns:
        The folder.

    Raises:
        UnsupportedError: if the network is still elastic, is of no supported family, or has something that
            could not be rebuilt, or if a binary layer does not compute with codes now, as in BiPer's first
            stage. Nothing was written.
        SavedFolderError: if the folder holds something else. Nothing was written.
        TypeError: if ``model`` is not a module, or a value to be kept with it not a number or string.
        ValueError: if such a value, or a weight of a binary layer, is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"nas.save: model must be a torch.nn.Module, got {type(model).__name__}.")
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given
    _refuse_elastic(model)
    _refuse_without_values(model)
    forms = coded_layers(model)
    plain = plain_copy(model) if forms else model
    name, family = _family_of(plain)
    shared = shared_parameters(plain)
    described, stored_names = family.describe(plain, shared), family.stored_names(plain)
    weights = _weights(plain, shared, described.derived, stored_names)
    if forms:
        _refuse_shared_codes(forms, shared)
        described, weights = _with_codes(model, forms, described, weights, stored_names)
    packages = ("lightning-nas", "torch", family.library, "safetensors")
    description: dict[str, Any] = {
        "format": FORMAT,
        "format_version": WITH_CODES if forms else FORMAT_VERSION,
        "written_with": {package: _version(package) for package in packages},
        "family": name,
        "network": described.network,
        "rebuild": described.rebuild,
        **described.entries,
        "files": sorted(described.files),
        "parameters": sum(p.numel() for p in model.parameters()),
        "architecture": _plain("architecture", architecture),
        "metrics": _plain("metrics", metrics),
    }
    folder = Path(folder)
    _check_target(folder)
    _write(folder, weights, shared, description, described.files)
    if forms:
        before, after = description["binary"]["float_bytes"], (folder / WEIGHTS).stat().st_size
        print(  # noqa: T201  # asked for: what binary layers are for
            f"nas.save: {len(forms)} binary layers as bits: {before:,} bytes became {after:,} "
            f"({before / after:.1f} times smaller)."
        )
    return folder


def load(folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The network that :func:`save` wrote, in evaluation mode.

    Reads JSON and safetensors; nothing is unpickled and no code of the folder runs.

    Args:
        folder: written by :func:`save`.
        device: where the weights go.

    Returns:
        The plain network, weights in their saved types, equal to the saved one bit for bit. Its binary layers
        have codes and no latent weights: they compute the same, and refuse to be trained.

    Raises:
        SavedFolderError: if the folder or a file of it is missing, damaged, or of a newer format.
    """
    folder = Path(folder)
    description = _read_description(folder)
    family = _family_named(str(description["family"]))
    if family is None:
        raise SavedFolderError(
            f"nas.load: {folder / DESCRIPTION} names the family {description['family']!r}, which is unknown "
            f"here; known are {', '.join(_known_families())}. Load it with the version that wrote it: "
            f"{description.get('written_with')}."
        )
    _check_weights(folder, description["weights"])
    forms = description["binary"]["layers"] if description["format_version"] == WITH_CODES else {}
    try:
        with torch.device("meta"):
            model = family.build(description["network"])
            stored_names = family.stored_names(model)
            freeze(model, forms)
    except Exception as error:  # timm asserts, torch raises; whatever it is, the JSON asked for it
        raise SavedFolderError(
            f"nas.load: {folder / DESCRIPTION} describes a network that cannot be built "
            f"({type(error).__name__}: {error}). It was written with {description.get('written_with')}; "
            f"this is {family.library} {_version(family.library)}. Save the network again."
        ) from error
    try:
        weights = load_file(folder / WEIGHTS, device=str(device))
    except SafetensorError as error:
        raise SavedFolderError(
            f"nas.load: {folder / WEIGHTS} is damaged ({error}). Save the network again."
        ) from error
    try:
        weights = decoded(weights, forms)
    except ValueError as error:
        raise SavedFolderError(
            f"nas.load: {folder / WEIGHTS} does not fit {DESCRIPTION}: {error}. Save the network again."
        ) from error
    shared = description["weights"].get("shared", {})
    names = {stored_names.get(name, name): name for name in model.state_dict() if name not in shared}
    weights = {names.get(stored, stored): tensor for stored, tensor in weights.items()}
    _check_tensors(folder / WEIGHTS, model, weights, shared)
    # The file's own memory is not aligned as torch's is, and kernels round differently on it: the last bits.
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    weights.update({name: weights[stored] for name, stored in shared.items()})
    model.load_state_dict(weights, assign=True)
    for name, stored in shared.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(stored))
    return model.to(device).eval()  # derived buffers were made on the CPU


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """Parameters that are another name of an earlier one, and the name of that one."""
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            shared[name] = first[id(parameter)]
    return shared


# --- families


def _saving_files() -> tuple[str, ...]:
    package = import_module("lightning_nas.supernet.families")
    return tuple(m.name for m in pkgutil.iter_modules(package.__path__) if m.name.endswith("_saving"))


def _known_families() -> tuple[str, ...]:
    files = (file.removeprefix("_").removesuffix("_saving") for file in _saving_files())
    return tuple(sorted({*saved_families, *files}))


def _family_named(name: str) -> SavedFamily | None:
    file = f"_{name}_saving"
    if name not in saved_families and file in _saving_files():
        import_module(f"lightning_nas.supernet.families.{file}")
    known = {registered: saved_families[registered] for registered in saved_families}
    return known.get(name)


def _family_of(model: nn.Module) -> tuple[str, SavedFamily]:
    libraries = {ancestor.__module__.partition(".")[0] for ancestor in type(model).__mro__}
    for name in _known_families():
        is_in_use = any(name == library or name.startswith(f"{library}_") for library in libraries)
        if name in saved_families or is_in_use:  # imports no library that is not in use
            family = _family_named(name)
            if family is not None and family.supports(model):
                return name, family
    families = {name: family for name in _known_families() if (family := _family_named(name)) is not None}
    inside = [
        path for path, child in model.named_modules() if any(f.supports(child) for f in families.values())
    ]
    hint = f" Its sub-module {inside[0]!r} is one: save that." if inside else ""
    raise UnsupportedError(
        f"nas.save: a {type(model).__module__}.{type(model).__qualname__} cannot be saved; supported are "
        f"{'; '.join(family.networks for family in families.values())}.{hint}"
    )


def _refuse_elastic(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if any(ancestor.__module__.startswith("lightning_nas.supernet") for ancestor in type(module).__mro__):
            raise UnsupportedError(
                f"nas.save: the network is still elastic ({path or 'itself'} is a {type(module).__name__}). "
                "Extract first, nas.save(supernet.extract(architecture), ...), or call supernet.release() to "
                "save it whole."
            )


# --- writing


def _refuse_without_values(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise UnsupportedError(
                f"nas.save: {name!r} holds no values (meta device, or not a tensor). Load weights first."
            )


def _weights(
    model: nn.Module, shared: Mapping[str, str], derived: frozenset[str], stored_names: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors to store, by the names that they get in the file."""
    state = model.state_dict()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in state and name not in derived:
            raise UnsupportedError(
                f"nas.save: the buffer {name!r} (shape {tuple(buffer.shape)}) is not persistent, so no file "
                "would hold it. Register it with persistent=True."
            )
    # A clone owns its memory: safetensors refuses tensors that are views of a common one.
    return {
        stored_names.get(name, name): tensor.detach().cpu().clone().contiguous()
        for name, tensor in state.items()
        if name not in shared
    }


def _refuse_shared_codes(forms: Mapping[str, Any], shared: Mapping[str, str]) -> None:
    for name, first in shared.items():
        for layer in forms:
            if f"{layer}.weight" in (name, first):
                raise UnsupportedError(
                    f"nas.save: {name} and {first} are one tensor, and {layer} is binary: bits cannot be "
                    "shared. Untie them before nas.binarize, or leave the layer out with exclude=."
                )


def _with_codes(
    model: nn.Module,
    forms: Mapping[str, Any],
    described: Description,
    weights: Mapping[str, Tensor],
    stored_names: Mapping[str, str],
) -> tuple[Description, dict[str, Tensor]]:
    """The description and the tensors with bits in the place of the latent weights of binary layers."""
    latent = {stored_names.get(f"{layer}.weight", f"{layer}.weight") for layer in forms}
    before = sum(tensor.nbytes for tensor in weights.values())
    binary = {"bits": LAYOUT, "float_bytes": before, "layers": forms}
    weights = {**{name: tensor for name, tensor in weights.items() if name not in latent}, **encoded(model)}
    return replace(described, rebuild=_REBUILD_CODES, files={}, entries={"binary": binary}), weights


def _write(
    folder: Path,
    weights: Mapping[str, Tensor],
    shared: Mapping[str, str],
    description: Mapping[str, Any],
    files: Mapping[str, str],
) -> None:
    """Each file complete before it takes its place, the description, which vouches for the rest, last."""
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{_BEING_WRITTEN}{uuid.uuid4().hex}"
    try:
        unfinished.mkdir()
        save_file(dict(weights), unfinished / WEIGHTS, metadata={"format": "pt"})
        vouched = {
            "file": WEIGHTS,
            "sha256": _sha256(unfinished / WEIGHTS),
            "size_bytes": (unfinished / WEIGHTS).stat().st_size,
            "shared": shared,
        }
        text = json.dumps({**description, "weights": vouched}, indent=2) + "\n"
        for name, content in {**files, DESCRIPTION: text}.items():
            (unfinished / name).write_text(content, encoding="utf-8")
        earlier = _earlier_description(folder) or {}
        for name in (WEIGHTS, *files):
            os.replace(unfinished / name, folder / name)
        for name in {Path(name).name for name in earlier.get("files", ["network.py"])} - {WEIGHTS, *files}:
            (folder / name).unlink(missing_ok=True)
        os.replace(unfinished / DESCRIPTION, folder / DESCRIPTION)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if created and not any(folder.iterdir()):
            folder.rmdir()


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SavedFolderError(f"nas.save: {folder} is a file; a folder is needed. Choose another name.")
    if not folder.exists() or _earlier_description(folder) is not None:
        return
    strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith(_BEING_WRITTEN))
    if strangers:
        raise SavedFolderError(
            f"nas.save: {folder} is not empty ({', '.join(strangers[:3])}{', ...' if strangers[3:] else ''}) "
            "and was not written by nas.save. Choose a new folder; nothing was written."
        )


def _earlier_description(folder: Path) -> dict[str, Any] | None:
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(description, dict) and description.get("format") == FORMAT
    return description if is_ours else None


def _plain(argument: str, values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The values as JSON holds them; numbers of numpy and torch become Python's."""
    if values is None:
        return None
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    for name, value in plain.items():
        if not isinstance(value, bool | int | float | str):
            raise TypeError(
                f"nas.save: {argument}[{name!r}] must be a number or a string, got {type(value).__name__}."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"nas.save: {argument}[{name!r}] is {value}, which JSON cannot hold. Leave it out."
            )
    return plain


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


# --- reading


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not folder.is_dir():
        raise SavedFolderError(f"nas.load: there is no folder {folder}. Give the folder that nas.save wrote.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SavedFolderError(
            f"nas.load: {folder} has no {DESCRIPTION}, so it is not a saved network or its saving was "
            "interrupted. Save the network again."
        ) from error
    except (OSError, ValueError) as error:
        raise SavedFolderError(
            f"nas.load: {path} is not readable JSON ({error}). Save the network again."
        ) from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise SavedFolderError(
            f'nas.load: {path} lacks "format": "{FORMAT}"; it was not written by nas.save.'
        )
    version = description.get("format_version")
    if version not in (FORMAT_VERSION, WITH_CODES):
        raise SavedFolderError(
            f"nas.load: {path} has format version {version!r}, this lightning-nas reads {FORMAT_VERSION} and "
            f"{WITH_CODES}. "
            f"Load it with the version that wrote it ({description.get('written_with')}), or a newer one."
        )
    for key, kind in (("family", str), ("network", dict), ("weights", dict)):
        if not isinstance(description.get(key), kind):
            raise SavedFolderError(
                f"nas.load: {path} lacks {key!r} or it is damaged. Save the network again."
            )
    binary = description.get("binary")
    if version == WITH_CODES and not (isinstance(binary, dict) and isinstance(binary.get("layers"), dict)):
        raise SavedFolderError(f"nas.load: {path} lacks its binary layers. Save the network again.")
    return description


def _check_weights(folder: Path, expected: Mapping[str, Any]) -> None:
    path = folder / WEIGHTS
    if not path.is_file():
        raise SavedFolderError(
            f"nas.load: {folder} has no {WEIGHTS}. Copy it there, or save the network again."
        )
    if path.stat().st_size != expected.get("size_bytes"):
        raise SavedFolderError(
            f"nas.load: {path} has {path.stat().st_size} bytes, {DESCRIPTION} expects "
            f"{expected.get('size_bytes')}: it was truncated or replaced. Copy it again, or save the network "
            "again."
        )
    if _sha256(path) != expected.get("sha256"):
        raise SavedFolderError(
            f"nas.load: the SHA-256 of {path} is not the one in {DESCRIPTION}: it was altered, or belongs to "
            "another network. Copy both files again, or save the network again."
        )


def _check_tensors(
    path: Path, model: nn.Module, weights: Mapping[str, Tensor], shared: Mapping[str, str]
) -> None:
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in shared}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    faults = [f"{name} is missing" for name in needed if name not in found]
    faults += [f"{name} is not part of the network" for name in found if name not in needed]
    faults += [
        f"{n} is {found[n]}, expected {needed[n]}" for n in needed if n in found and found[n] != needed[n]
    ]
    faults += [
        f"{name} shares {stored}, which is missing" for name, stored in shared.items() if stored not in found
    ]
    if faults:
        raise SavedFolderError(
            f"nas.load: {path} does not fit {DESCRIPTION}: {'; '.join(faults[:3])}"
            f"{f' and {len(faults) - 3} more' if faults[3:] else ''}. Save the network again."
        )
