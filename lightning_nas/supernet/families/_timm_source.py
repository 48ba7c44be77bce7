"""A network of timm from plain data, and the Python file that makes it where this package is missing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from importlib import import_module, metadata
from typing import Any

import timm
import torch

__all__ = ["build", "change", "source"]


def build(network: Mapping[str, Any]) -> torch.nn.Module:
    """The network, its weights still to be loaded: timm's own, changed as network.json lists."""
    name, arguments = network["name"], {k: decoded(value) for k, value in network["arguments"].items()}
    if not timm.is_model(name):  # nor the name of a place from which timm would download
        raise ValueError(f"{name!r} is not a model of timm {timm.__version__}")
    create = partial(timm.create_model, name, pretrained=False, pretrained_cfg=None, checkpoint_path=None)
    if {*create.keywords} & {*arguments}:
        raise ValueError(f"{', '.join(create.keywords)} cannot be given")
    with torch.device("meta"):
        model: torch.nn.Module = create(**arguments)
    if dict(model.named_buffers()).keys() - model.state_dict().keys():  # no file has the values of these
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = create(**arguments)
    change(model, **network["subnetwork"])
    return model


def change(
    model: torch.nn.Module,
    blocks: Mapping[str, list[int]],
    classes: Mapping[str, Any],
    shapes: Mapping[str, list[int] | None],
    attributes: Mapping[str, Any],
    dtypes: Mapping[str, str],
) -> None:
    """Give a stock network the blocks, layers, shapes and attributes of a subnetwork."""
    for name, kept in blocks.items():
        container = model.get_submodule(name)
        children = [list(container.children())[i] for i in kept]
        container._modules.clear()
        container._modules.update((str(i), child) for i, child in enumerate(children))
    for name, layer in classes.items():
        path, _, child = name.rpartition(".")
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            setattr(model.get_submodule(path), child, decoded(layer)())
    for name, shape in shapes.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = None if shape is None else torch.empty(shape)
        if tensor is not None and attribute not in module._buffers:
            tensor = torch.nn.Parameter(tensor)
        setattr(module, attribute, tensor)
    for name, value in attributes.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        stays_list = isinstance(getattr(module, attribute, None), list)
        setattr(module, attribute, [decoded(v) for v in value] if stays_list else decoded(value))
    for name, dtype in dtypes.items():
        buffer = model.get_buffer(name)
        buffer.data = buffer.data.to(getattr(torch, dtype))


def decoded(value: Any) -> Any:
    """A value of network.json: lists are tuples, and layers are found by their names."""
    if isinstance(value, list):
        return tuple(map(decoded, value))
    if not isinstance(value, dict):
        return value
    values = {name: decoded(item) for name, item in value.items()}
    if "class" not in values:
        return values
    layer = layer_class(values.pop("class"))
    return partial(layer, **values) if values else layer


def layer_class(name: str) -> type[torch.nn.Module]:
    """A layer of timm or torch by its full name."""
    module, _, attribute = name.rpartition(".")
    found = getattr(import_module(module), attribute) if module.split(".")[0] in ("timm", "torch") else None
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise ValueError(f"{name!r} is not a layer of timm or torch")
    return found


def source(name: str, network: Mapping[str, Any]) -> str:
    """A module that builds and loads the network with timm, torch and safetensors alone."""
    needed = ("timm", "torch", "safetensors")
    versions = ", ".join(f"{package} {metadata.version(package).partition('+')[0]}" for package in needed)
    # Their text is part of the file: they use nothing but what that imports.
    functions = "\n\n".join(inspect.getsource(part) for part in (build, change, decoded, layer_class))
    return f'''"""A {name}, written by lightning-nas.

It is timm's {network["name"]} with the blocks, layers and sizes that network.json lists under
"subnetwork". It needs timm, torch and safetensors, nothing else
(written with {versions}):

    from network import load

    model = load()  # weights from model.safetensors beside this file

`python network.py` loads it and prints its size.
"""

import json
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file


def load(device: str = "cpu") -> torch.nn.Module:
    """The network with the weights of model.safetensors, in evaluation mode."""
    folder = Path(__file__).parent
    description = json.loads((folder / "network.json").read_text(encoding="utf-8"))
    model = build(description["network"])
    stored = load_file(folder / "model.safetensors", device=device)
    # Memory aligned as torch's own, on which kernels round as they did.
    weights = {{name: tensor.clone() for name, tensor in stored.items()}}
    shared = description["weights"]["shared"]
    weights.update({{name: weights[first] for name, first in shared.items()}})
    model.load_state_dict(weights, assign=True)
    for name, first in shared.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(first))
    return model.to(device).eval()


{functions}

if __name__ == "__main__":
    network = load()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{{type(network).__name__}}: {{parameters:,}} parameters")
'''
