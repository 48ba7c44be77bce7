"""Any network of timm as plain data: the ``create_model`` call it came from, and how it differs from that.

The network is compared, module by module, with the stock twin that the call gives. Where nothing differs, the
call is all there is to write. Else a list says which blocks stay, which layers are of another class, which
tensors have another shape and which plain attributes another value; a small Python file, beside the weights,
applies it. Whatever else differs is refused by name. No model class is known here.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.saving import Description, SavedFamily, saved_families
from lightning_nas.supernet.families._timm_source import build, change, source

_WITH_TIMM = (
    "model = timm.create_model(timm['name'], **timm['kwargs']); "
    "model.load_state_dict(safetensors.torch.load_file('model.safetensors')); model.eval()"
)
_WITH_SOURCE = "from network import load; model = load()  # needs timm, torch and safetensors"
_REGULARIZERS = (nn.Identity, nn.Dropout, DropPath, PatchDropout)  # without effect in evaluation mode
_RATES = ("p", "drop_prob", "prob", "attn_drop_p", "drop_rate", "drop_path_rate")
_NOT_COMPARED = {  # of every module, and where it came from, how it was initialised, how it is trained
    *vars(nn.Module()), "default_cfg", "pretrained_model_args", "_traits", "_model_args", "weight_init_mode",
    "fix_init", "init_values", "grad_checkpointing",
}  # fmt: skip
_ADDRESSES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")  # of other weights


def supports(model: nn.Module) -> bool:
    """Whether the module is a network of timm; a subclass of yours may compute anything."""
    return type(model).__module__.startswith("timm.models.") and hasattr(model, "reset_classifier")


def describe(model: nn.Module, shared: Mapping[str, str]) -> Description:
    """The ``create_model`` call, and what to change in what it returns.

    Raises:
        UnsupportedError: naming what could not be restored.
    """
    network = _network(model)
    derived = frozenset(_outside_of_state(model))
    if not shared and _call_says_all(model, network):
        call = {"name": network["name"], "kwargs": network["arguments"]}
        return Description(network, _WITH_TIMM, entries={"timm": call}, derived=derived)
    files = {"network.py": source(type(model).__name__, network)}
    return Description(network, _WITH_SOURCE, files, {"timm": None}, derived)


# --- where it came from


def _network(model: Any) -> dict[str, Any]:
    """The network as data, from the first stock network that it can be made from."""
    cfg, fault = getattr(model, "pretrained_cfg", None) or {}, ""
    today = {name: getattr(model, name) for name in ("num_classes", "in_chans") if hasattr(model, name)}
    if architecture := cfg.get("architecture"):
        names = [".".join(filter(None, (architecture, cfg.get("tag")))), architecture]
    else:  # made without create_model: perhaps timm has one of the same layers
        names = timm.list_models(module=type(model).__module__.rpartition(".")[2])
    for name in names:
        try:
            made_with = {**getattr(model, "_model_args", {}), **today}
            arguments = {k: _encoded(value, f"the argument {k!r}") for k, value in made_with.items()}
            return _from_stock(model, name, arguments)
        except UnsupportedError as error:
            fault = f"{error}, so timm's {name} cannot become the network"
    if not architecture:
        fault = f"timm has no {type(model).__name__} of the same layers, from which it could be rebuilt"
    raise UnsupportedError(
        f"nas.save: {fault}. Make networks with timm.create_model(name, ...), which remembers how (timm "
        "1.0.31 and later)."
    )


def _from_stock(model: nn.Module, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    network = {"name": name, "arguments": arguments, "subnetwork": _NOTHING}
    try:
        twin = build(network)
    except Exception as error:  # an entry point that takes other arguments, or of another version of timm
        raise UnsupportedError(f"it cannot be made ({type(error).__name__}: {error})") from error
    if type(twin) is not type(model):
        raise UnsupportedError(f"the network is a {type(model).__name__}")
    return {**network, "subnetwork": _differences(model, twin)}


def _call_says_all(model: nn.Module, network: Mapping[str, Any]) -> bool:
    """Whether the call and float32 weights give the network in evaluation mode."""
    found = network["subnetwork"]
    attributes = {name.rpartition(".")[2] for name in found["attributes"]}
    classes = {layer["class"] for layer in found["classes"].values()}
    return (
        all(tensor.dtype == torch.float32 for tensor in model.parameters())
        and '"class":' not in json.dumps(network["arguments"])
        and not (found["blocks"] or found["shapes"] or found["dtypes"])
        and attributes <= {*_RATES}
        and classes <= set(map(_name, _REGULARIZERS))
    )


# --- comparing the network with its stock twin


def _differences(model: nn.Module, twin: nn.Module) -> dict[str, Any]:
    """What makes the twin the network, found kind by kind; the twin is changed on the way.

    Raises:
        UnsupportedError: naming a difference that nothing can make up for.
    """
    found = dict(_NOTHING)
    for kind, find in _KINDS.items():
        found[kind] = find(model, twin)
        change(twin, **{**_NOTHING, kind: found[kind]})
    return found


def _fewer_blocks(model: nn.Module, twin: nn.Module) -> dict[str, list[int]]:
    """Which of the twin's blocks stay: the first ones that are alike, in containers that have fewer."""
    found: dict[str, list[int]] = {}
    theirs = dict(twin.named_modules())
    for path, container in model.named_modules():
        stock = theirs.get(path)
        is_nested = any(path.startswith(f"{shortened}.") for shortened in found)
        if not isinstance(container, nn.Sequential | nn.ModuleList) or stock is None or is_nested:
            continue
        if not 0 < len(container) < len(candidates := list(stock.children())):
            continue
        at, kept = enumerate(candidates), []
        for block in container:
            kept += [next((i for i, candidate in at if _layers(candidate) == _layers(block)), None)]
        if None not in kept:
            found[path] = kept  # type: ignore[assignment]  # without None
    return found


def _layers(module: nn.Module) -> list[tuple[str, Any]]:
    kinds = [
        (path, nn.Identity if type(layer) in _REGULARIZERS else type(layer))
        for path, layer in module.named_modules()
    ]
    return [*kinds, *((name, None) for name, _ in module.named_buffers())]


def _other_classes(model: nn.Module, twin: nn.Module) -> dict[str, Any]:
    """The layers that are of another class, and the arguments that their classes insist on."""
    ours, theirs = _modules(model), _modules(twin)
    return {
        path: _layer(path, layer) for path, layer in ours.items() if type(layer) is not type(theirs.get(path))
    }


def _layer(path: str, layer: nn.Module) -> dict[str, Any]:
    needed = [
        p.name
        for p in inspect.signature(type(layer)).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    said = {name: getattr(layer, name, layer) for name in needed}
    if not _is_plain(said):
        raise UnsupportedError(f"{path!r} is a {type(layer).__name__}, which timm does not make it")
    return {**_encoded(type(layer), repr(path)), **said}


def _other_shapes(model: nn.Module, twin: nn.Module) -> dict[str, list[int] | None]:
    ours, theirs = ({k: [*v.shape] for k, v in m.state_dict().items()} for m in (model, twin))
    names = {**ours, **theirs}
    return {name: ours.get(name) for name in names if ours.get(name) != theirs.get(name)}


def _other_attributes(model: nn.Module, twin: nn.Module) -> dict[str, Any]:
    ours, theirs = _modules(model), _modules(twin)
    if absent := theirs.keys() - ours.keys():
        path = min(absent)
        raise UnsupportedError(f"{path!r} is missing, timm makes it a {type(theirs[path]).__name__}")
    found: dict[str, Any] = {}
    for path, module in ours.items():
        stock = vars(theirs[path])
        for attribute, value in vars(module).items():
            if attribute in _NOT_COMPARED or (attribute in stock and _equal(value, stock[attribute])):
                continue
            name = f"{path}.{attribute}".lstrip(".")
            if attribute == "pretrained_cfg":
                value, other = (_without_addresses(cfg) for cfg in (value, stock.get(attribute, {})))
                if value == other:
                    continue
            if _is_plain(value):
                found[name] = _encoded(value, name)
            elif not attribute.startswith("_"):
                raise UnsupportedError(
                    f"the attribute {name!r} ({type(value).__name__}) is not what timm gives it, and cannot "
                    "be stored"
                )
    return found


def _other_dtypes(model: nn.Module, twin: nn.Module) -> dict[str, str]:
    """Types of the buffers that no file holds, where they are not the twin's; their values have to be."""
    ours, theirs = _outside_of_state(model), _outside_of_state(twin)
    for name in {**ours, **theirs}:
        mine, other = ours.get(name), theirs.get(name)
        if mine is None or other is None or not torch.equal(mine.cpu(), other.to(mine.dtype)):
            raise UnsupportedError(
                f"the buffer {name!r} is not persistent, so no file would hold it, and timm gives it other "
                "values"
            )
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in ours.items()
        if buffer.dtype != theirs[name].dtype
    }


_KINDS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "blocks": _fewer_blocks,
    "classes": _other_classes,
    "shapes": _other_shapes,
    "attributes": _other_attributes,
    "dtypes": _other_dtypes,
}
_NOTHING: dict[str, Any] = {kind: {} for kind in _KINDS}


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _outside_of_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in state}


def _without_addresses(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing and origin of a network, not where its original weights lie: these are others."""
    return {k: v for k, v in cfg.items() if k not in _ADDRESSES and v is not None and _is_plain(v)}


# --- values


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(type(name) is str and _is_plain(item) for name, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _encoded(value: Any, where: str) -> Any:
    """A value for JSON, which the generated file reads.

    Raises:
        UnsupportedError: if it is neither plain nor a layer of timm or torch.
    """
    if isinstance(value, list | tuple):
        return [_encoded(item, where) for item in value]
    if isinstance(value, dict):
        return {name: _encoded(item, where) for name, item in value.items()}
    if isinstance(value, partial) and not value.args:
        return {**_encoded(value.func, where), **_encoded(value.keywords, where)}
    if isinstance(value, type) and issubclass(value, nn.Module):
        name = _name(value)
        if name.split(".")[0] in ("timm", "torch"):
            return {"class": name}
    elif _is_plain(value):
        return value
    raise UnsupportedError(f"{where} is {value!r}, neither a plain value nor a layer of timm or torch")


def _name(layer: type) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"


def _equal(value: Any, stock: Any) -> bool:
    if _is_plain(value) and _is_plain(stock):
        return json.dumps(value) == json.dumps(stock)  # 1 is not True, but a tuple may have become a list
    if isinstance(value, partial) and isinstance(stock, partial):
        return (value.func, value.args, value.keywords) == (stock.func, stock.args, stock.keywords)
    return type(value) is type(stock) and not isinstance(value, Tensor) and bool(value == stock)


saved_families.register("timm")(SavedFamily("every network of timm", "timm", supports, describe, build))
