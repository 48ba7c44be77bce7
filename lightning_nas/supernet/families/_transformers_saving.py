"""Any network of transformers as plain data: its configuration, and how it differs from what that builds.

The network is compared, module by module, with the stock twin that its configuration alone gives. Where
nothing differs, the folder is a standard checkpoint. Where tensors are smaller or plain attributes have other
values, these are listed in ``config.json``, and a small modelling file, for ``trust_remote_code=True``,
applies the list. Whatever else differs is refused by name. No model class is known here.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from copy import copy, deepcopy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from lightning_nas.errors import UnsupportedError
from lightning_nas.saving import Description, SavedFamily, saved_families, shared_parameters

_SOURCE = "modeling_subnetwork"
_NOT_COMPARED = {  # of every module, and where it came from, how it is trained
    *vars(nn.Module()), "name_or_path", "generation_config", "gradient_checkpointing", "hf_device_map",
    "_is_hf_initialized", "_use_kernels",
}  # fmt: skip
_RATES = {"p", "drop_prob"}  # without effect in evaluation mode


def supports(model: nn.Module) -> bool:
    """Whether the module is of a class that transformers exports; a subclass may compute anything."""
    return isinstance(model, PreTrainedModel) and _exported(type(model).__name__) is type(model)


def describe(model: PreTrainedModel, shared: Mapping[str, str]) -> Description:
    """The class, its configuration, and in which tensors and attributes the network differs from that.

    Raises:
        UnsupportedError: naming what could not be restored.
    """
    name = type(model).__name__
    try:
        written_by_saving = {"architectures": [name], "dtype": _dtype(model)}
        config = dict(sorted({**json.loads(model.config.to_json_string()), **written_by_saving}.items()))
        config.pop("auto_map", None)  # of the checkpoint that it came from
        network: dict[str, Any] = {
            "class": f"transformers.{name}",
            "config": config,
            "attention": _attention(model.config),
            "generation_config": None,
        }
        if model.can_generate():
            network["generation_config"] = json.loads(model.generation_config.to_json_string())
        twin = _stock(network)
    except Exception as error:  # configurations check themselves, each in its own way
        raise UnsupportedError(
            f"nas.save: transformers {transformers.__version__} cannot build a {name} from the config of the "
            f"network ({type(error).__name__}: {error}). Give model.config the values that this asks for."
        ) from error
    absent = _absent(model, twin)
    _leave_out(twin, absent)
    _compare_modules(model, twin)
    _compare_ties(shared, shared_parameters(twin))
    network["subnetwork"] = {
        "shapes": _smaller_shapes(model, twin),
        "dtypes": _other_dtypes(model),
        "attributes": _other_attributes(model, twin),
        "absent": absent,
    }
    network["buffers"] = _derived_buffers(model, twin)
    if _config_says_all(**network["subnetwork"]):
        rebuild = f"model = transformers.{name}.from_pretrained(folder{_kernels(network)})"
        files = {"config.json": _json(config)}
    else:
        rebuild, files = _with_modelling_file(name, network, _auto_classes(twin))
    if network["generation_config"] is not None:
        files["generation_config.json"] = _json(network["generation_config"])
    return Description(network, rebuild, files, derived=frozenset(_outside_of_state(model)))


def build(network: Mapping[str, Any]) -> PreTrainedModel:
    """The network that :func:`describe` described, its weights still to be loaded."""
    model = _stock(network)
    shrink(model, **network["subnetwork"])
    for name, dtype in network["buffers"].items():
        buffer = model.get_buffer(name)
        buffer.data = buffer.to(getattr(torch, dtype))
    if network["generation_config"] is not None:
        model.generation_config = model.generation_config_class.from_dict(network["generation_config"])
    return model


# Its text is part of the modelling file: it uses nothing but what that imports.
def shrink(
    model: transformers.PreTrainedModel,
    shapes: dict[str, list[int]],
    dtypes: dict[str, str],
    attributes: dict[str, object],
    absent: list[str],
) -> None:
    """Give a stock network the smaller tensors and other attributes of a subnetwork."""
    for name in absent:
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, None)
    for name, shape in shapes.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        whole = getattr(module, attribute)
        part = whole.detach()[tuple(slice(size) for size in shape)].clone()
        if isinstance(whole, torch.nn.Parameter):
            part = torch.nn.Parameter(part, whole.requires_grad)
        setattr(module, attribute, part)
    for name, dtype in dtypes.items():
        path, _, attribute = name.rpartition(".")
        tensor = getattr(model.get_submodule(path), attribute)
        tensor.data = tensor.data.to(getattr(torch, dtype))
    for name, value in attributes.items():
        path, _, attribute = name.rpartition(".")
        value = tuple(value) if isinstance(value, list) else value
        setattr(model.get_submodule(path), attribute, value)
    model.tie_weights()


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """The names that ``save_pretrained`` gives to tensors, as far as it only renames them."""
    model = copy(model)
    vars(model).pop("_weight_conversions", None)  # of the one checkpoint that from_pretrained read
    state = model.state_dict()
    names = {id(tensor): name for name, tensor in state.items()}
    stored = revert_weight_conversion(model, state)
    renamed = {names.get(id(tensor), "another tensor"): name for name, tensor in stored.items()}
    return renamed if renamed.keys() == state.keys() else {}


def _config_says_all(
    shapes: Mapping[str, Any], dtypes: Mapping[str, Any], attributes: Mapping[str, Any], absent: list[str]
) -> bool:
    return not (shapes or dtypes or absent) and all(name.rpartition(".")[2] in _RATES for name in attributes)


def _stock(network: Mapping[str, Any]) -> PreTrainedModel:
    """What the configuration alone builds: buffers with their values, parameters without."""
    package, _, name = network["class"].rpartition(".")
    model_class = _exported(name)
    is_network = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    if package != "transformers" or not is_network:
        raise ValueError(f"{network['class']!r} is not a network that transformers exports")
    config = model_class.config_class.from_dict(
        deepcopy(network["config"]), attn_implementation=network["attention"]
    )
    # Not on the meta device: buffers outside of the state dict get their values nowhere else. Memory of
    # parameters that nothing is written to costs nothing.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), no_init_weights():
        model = model_class(config)
    model.tie_weights()
    return model


def _exported(name: str) -> Any:
    return getattr(transformers, name, None)


def _attention(config: PreTrainedConfig) -> dict[str, str]:
    """The kernels that every machine has, of the network and its parts; they decide the last bits."""
    parts = {"": config, **{key: getattr(config, key) for key in config.sub_configs}}
    kernels = {key: getattr(part, "_attn_implementation", None) for key, part in parts.items()}
    return {key: kernel for key, kernel in kernels.items() if kernel in ("eager", "sdpa")}


# --- for a process without this package


def _kernels(network: Mapping[str, Any]) -> str:
    """What ``from_pretrained`` has to be told of the kernels."""
    kernels = network["attention"]
    if "eager" not in kernels.values():
        return ""
    return f", attn_implementation={kernels[''] if len({*kernels.values()}) == 1 else kernels!r}"


def _with_modelling_file(
    name: str, network: Mapping[str, Any], autos: list[str]
) -> tuple[str, dict[str, str]]:
    """How to load the folder by a file in it, and the texts of that file and of ``config.json``."""
    config = {**network["config"], "subnetwork": network["subnetwork"]}
    if autos:
        config["auto_map"] = dict.fromkeys(autos, f"{_SOURCE}.{name}")
        options = f"{_kernels(network)}, trust_remote_code=True"
        rebuild = f"model = transformers.{autos[0]}.from_pretrained(folder{options})"
    else:
        call = f"model = {name}.from_pretrained(folder{_kernels(network)})"
        rebuild = f"from {_SOURCE} import {name}; {call}  # with the folder in sys.path"
    return rebuild, {"config.json": _json(config), f"{_SOURCE}.py": _source(name, rebuild)}


def _auto_classes(model: PreTrainedModel) -> list[str]:
    """The Auto classes that know the network's class, the one named like it first."""
    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("Auto") and mapping is not None and type(model.config) in mapping:
            classes = mapping[type(model.config)]
            if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
                found.append(name)
    own = type(model).__name__
    return sorted(
        found,
        key=lambda n: (not own.endswith(n.removeprefix("AutoModel")), n == "AutoModelForPreTraining", n),
    )


def _source(name: str, rebuild: str) -> str:
    """A module with a subclass that makes the network's layers as small as ``config.json`` says."""
    return f'''"""A {name} with smaller layers, written by lightning-nas.

The layers are listed in config.json under "subnetwork". It needs transformers and torch
(written with transformers {transformers.__version__}, torch {torch.__version__.partition("+")[0]}):

    {rebuild}
"""

import torch
import transformers


class {name}(transformers.{name}):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        shrink(self, **config.subnetwork)


{inspect.getsource(shrink)}'''


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _dtype(tensors: Any) -> str:
    return str(tensors.dtype).removeprefix("torch.")


# --- comparing the network with its stock twin


def _absent(model: nn.Module, twin: nn.Module) -> list[str]:
    """Optional modules that the network was made without, such as a pooler."""
    ours, found = dict(model.named_modules(remove_duplicate=False)), []
    for path, _ in twin.named_modules(remove_duplicate=False):
        parent, _, name = path.rpartition(".")
        is_missing = path not in ours and parent in ours
        if is_missing and getattr(ours[parent], name, ours) is None:  # set to None, not left out by mistake
            found.append(path)
    return found


def _leave_out(model: nn.Module, absent: list[str]) -> None:
    for path in absent:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, None)


def _compare_modules(model: nn.Module, twin: nn.Module) -> None:
    ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (model, twin))
    for path in {**ours, **theirs}:
        if type(ours.get(path)) is not type(theirs.get(path)):
            raise UnsupportedError(
                f"nas.save: {path!r} is {_kind(ours.get(path))}, but the config of the network makes it "
                f"{_kind(theirs.get(path))}; a network changed in this way cannot be rebuilt. Where the "
                "number of layers changed, set it in model.config."
            )


def _kind(module: nn.Module | None) -> str:
    return "absent" if module is None else f"a {type(module).__name__}"


def _compare_ties(ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    different = sorted(ours.items() ^ theirs.items())
    if different:
        name, first = different[0]
        found, expected = ("one tensor", "two") if name in ours else ("two tensors", "one")
        raise UnsupportedError(
            f"nas.save: {name!r} and {first!r} are {found}, but the config of the network makes them "
            f"{expected}. Change model.config.tie_word_embeddings, or tie or copy the tensors."
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _smaller_shapes(model: nn.Module, twin: nn.Module) -> dict[str, list[int]]:
    ours, theirs = ({k: tuple(v.shape) for k, v in _tensors(m).items()} for m in (model, twin))
    for name in {**ours, **theirs}:
        mine, stock = ours.get(name), theirs.get(name)
        if mine is None or stock is None or len(mine) != len(stock) or any(map(int.__gt__, mine, stock)):
            raise UnsupportedError(
                f"nas.save: {name!r} has the shape {mine}, the config of the network makes it {stock}; only "
                "a smaller tensor can be rebuilt. Give model.config the sizes of the network."
            )
    return {name: list(shape) for name, shape in ours.items() if shape != theirs[name]}


def _other_dtypes(model: PreTrainedModel) -> dict[str, str]:
    """What ``from_pretrained``, which gives all parameters the first one's type, would change."""
    tensors = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    return {name: _dtype(t) for name, t in tensors.items() if t.dtype != model.dtype}


def _outside_of_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in state}


def _derived_buffers(model: nn.Module, twin: nn.Module) -> dict[str, str]:
    """Types of the buffers that no file holds, where they are not the twin's; their values have to be."""
    dtypes: dict[str, str] = {}
    for name, buffer in _outside_of_state(model).items():
        stock = twin.get_buffer(name)
        if stock.shape != buffer.shape or not torch.allclose(stock.to(buffer.dtype), buffer.cpu()):
            raise UnsupportedError(
                f"nas.save: the buffer {name!r} is not persistent, so no file would hold it, and its values "
                "are not those that the config of the network gives. Restore them, or change model.config."
            )
        if stock.dtype != buffer.dtype:
            dtypes[name] = _dtype(buffer)
    return dtypes


def _other_attributes(model: nn.Module, twin: nn.Module) -> dict[str, Any]:
    theirs = dict(twin.named_modules(remove_duplicate=False))
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        stock = vars(theirs[path])
        for attribute, value in vars(module).items():
            if attribute in _NOT_COMPARED or (attribute in stock and _equal(value, stock[attribute])):
                continue
            name = f"{path}.{attribute}".lstrip(".")
            if _is_plain(value):
                found[name] = list(value) if isinstance(value, tuple) else value
            elif not attribute.startswith("_"):
                raise UnsupportedError(
                    f"nas.save: the attribute {name!r} ({type(value).__name__}) is not what the config of "
                    "the network gives, and cannot be stored. Remove it, or change model.config."
                )
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _equal(value: Any, stock: Any) -> bool:
    if type(value) is not type(stock):
        return False
    if isinstance(value, Tensor):
        return torch.equal(value.cpu(), stock)
    if isinstance(value, PreTrainedConfig):
        return _settings(value) == _settings(stock)
    function = getattr(value, "__func__", value)  # a method is bound to a module of its own network
    return bool(function == getattr(stock, "__func__", stock))


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    written_by_saving = ("architectures", "dtype", "auto_map")
    return {k: v for k, v in config.to_diff_dict().items() if k not in written_by_saving}


saved_families.register("transformers")(
    SavedFamily("every network of transformers", "transformers", supports, describe, build, stored_names)
)
