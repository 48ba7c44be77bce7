"""A timm VisionTransformer described as data, printed as a Python file that stands alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

__all__ = ["CLASSES", "CLASS_ARGUMENTS", "source", "tuples"]

_VIT = "timm.models.vision_transformer"
CLASSES = {
    "visiontransformer": f"{_VIT}.VisionTransformer",
    "visiontransformerdistilled": "timm.models.deit.VisionTransformerDistilled",
    "block": f"{_VIT}.Block",
    "respostblock": f"{_VIT}.ResPostBlock",
    "parallelscalingblock": f"{_VIT}.ParallelScalingBlock",
    "diffparallelscalingblock": f"{_VIT}.DiffParallelScalingBlock",
    "parallelthingsblock": f"{_VIT}.ParallelThingsBlock",
    "attention": "timm.layers.Attention",
    "mlp": "timm.layers.Mlp",
    "swiglu": "timm.layers.SwiGLU",
    "swiglupacked": "timm.layers.SwiGLUPacked",
    "glumlp": "timm.layers.GluMlp",
    "droppath": "timm.layers.DropPath",
    "layernorm": "timm.layers.LayerNorm",
    "layernormfp32": "timm.layers.LayerNormFp32",
    "rmsnorm": "timm.layers.RmsNorm",
    "rmsnormfp32": "timm.layers.RmsNormFp32",
    "simplenorm": "timm.layers.SimpleNorm",
    "simplenormfp32": "timm.layers.SimpleNormFp32",
    "torch_layernorm": "torch.nn.LayerNorm",
    "torch_rmsnorm": "torch.nn.RMSNorm",
    "gelu": "torch.nn.GELU",
    "timm_gelu": "timm.layers.GELU",
    "gelu_tanh": "timm.layers.GELUTanh",
    "quick_gelu": "timm.layers.QuickGELU",
    "silu": "torch.nn.SiLU",
    "relu": "torch.nn.ReLU",
}
CLASS_ARGUMENTS = ("norm_layer", "embed_norm_layer", "act_layer", "mlp_layer", "block_fn")


def source(network: Mapping[str, Any], shared: Mapping[str, str]) -> str:
    """A file that rebuilds and loads the network with timm, torch and safetensors alone."""
    printer = _Printer()
    body = [f"    model = {printer.call(network['class'], network['arguments'], indent=4)}"]
    constants: dict[str, Mapping[str, Any]] = {}
    titles = {
        "num_heads": "HEADS",
        "hidden_features": "MLP_WIDTHS",
        "mlp_ratio": "MLP_RATIOS",
        "drop_prob": "DROP_PATHS",
    }
    for part in network["parts"]:
        title = titles[part["varies"]]
        title = (
            title if title not in constants else f"{title}_{sum(c.startswith(title) for c in constants) + 1}"
        )
        constants[title] = part["values"]
        made = printer.call(part["make"], part["arguments"], indent=8, last=part["varies"])
        body += [
            f"    for name, {part['varies']} in {title}.items():",
            f"        part = {made}",
            "        model.set_submodule(name, part)",
        ]
    if network["attributes"]:
        constants["ATTRIBUTES"] = network["attributes"]
        body += [
            "    for name, value in ATTRIBUTES.items():",
            '        path, _, attribute = name.rpartition(".")',
            "        setattr(model.get_submodule(path), attribute, value)",
        ]
    body += [
        "    for module in model.modules():",
        '        if hasattr(module, "fused_attn"):  # the attention kernel decides the last bits',
        f"            module.fused_attn = {network['fused_attn']}",
    ]
    if network["pretrained_cfg"]:
        constants["PRETRAINED_CFG"] = network["pretrained_cfg"]  # timm.data reads the preprocessing from it
        body.append("    model.pretrained_cfg = model.default_cfg = PRETRAINED_CFG")
    loading = [
        '    stored = load_file(Path(__file__).with_name("model.safetensors"), device=device)',
        "    # Memory aligned as torch's own, on which kernels round as they did.",
        "    weights = {name: tensor.clone() for name, tensor in stored.items()}",
    ]
    tying: list[str] = []
    if shared:
        constants["SHARED"] = shared
        loading.append("    weights.update({name: weights[first] for name, first in SHARED.items()})")
        tying = [
            "    for name, first in SHARED.items():",
            '        path, _, attribute = name.rpartition(".")',
            "        setattr(model.get_submodule(path), attribute, model.get_parameter(first))",
        ]
    model_class = printer.name(network["class"])
    lines = [
        _docstring(network),
        "",
        *printer.imports(),
        "",
        *(line for title, values in constants.items() for line in _constant(title, values)),
        *(["", ""] if constants else [""]),
        f"def build() -> {model_class}:",
        '    """The network, its weights still to be loaded."""',
        *body,
        "    return model",
        "",
        "",
        f'def load(device: str = "cpu") -> {model_class}:',
        '    """The network with the weights of model.safetensors, in evaluation mode."""',
        '    with torch.device("meta"):',
        "        model = build()",
        *loading,
        "    model.load_state_dict(weights, assign=True)",
        *tying,
        "    return model.eval()",
        "",
        "",
        'if __name__ == "__main__":',
        "    network = load()",
        "    parameters = sum(parameter.numel() for parameter in network.parameters())",
        "    dtype = network.patch_embed.proj.weight.dtype",
        f"    images = torch.zeros({', '.join(map(str, _input_shape(network)))}, dtype=dtype)",
        "    with torch.no_grad():",
        "        shape = tuple(network(images).shape)",
        '    print(f"{type(network).__name__}: {parameters:,} parameters, output {shape}")',
        "",
    ]
    return "\n".join(lines)


def _docstring(network: Mapping[str, Any]) -> str:
    heads = ", ".join("+".join(map(str, block["heads"].values())) for block in network["blocks"])
    widths = ", ".join("+".join(map(str, block["mlp"].values())) for block in network["blocks"])
    versions = ", ".join(
        f"{package} {metadata.version(package)}" for package in ("timm", "torch", "safetensors")
    )
    model_class = CLASSES[network["class"]].rpartition(".")[2]
    return f'''"""A {model_class} of {len(network["blocks"])} blocks, written by lightning-nas.

Attention heads by block: {heads} (of size {network["head_size"]}).
MLP widths by block: {widths}.

It needs timm, torch and safetensors, nothing else
(written with {versions}):

    from network import load

    model = load()  # weights from model.safetensors beside this file

`python network.py` loads it and prints its size and the shape of its output.
"""'''


def _input_shape(network: Mapping[str, Any]) -> tuple[int, ...]:
    size = network["arguments"]["img_size"]
    return (1, network["arguments"]["in_chans"], *(size if isinstance(size, list) else (size, size)))


def _constant(title: str, values: Mapping[str, Any]) -> list[str]:
    return [f"{title} = {{", *(f"    {_text(k)}: {_text(tuples(v))}," for k, v in values.items()), "}"]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


class _Printer:
    """Prints calls, and remembers which names they need imported."""

    def __init__(self) -> None:
        self._imported: dict[str, set[str]] = {}

    def name(self, short: str) -> str:
        module, _, name = CLASSES[short].rpartition(".")
        if module == "torch.nn":
            return f"torch.nn.{name}"
        self._imported.setdefault(module, set()).add(name)
        return name

    def call(self, short: str, arguments: Mapping[str, Any], indent: int, last: str = "") -> str:
        pad = " " * (indent + 4)
        rows = [f"{pad}{name}={self._value(name, value)}," for name, value in arguments.items()]
        rows += [f"{pad}{last}={last},"] if last else []
        return "\n".join([f"{self.name(short)}(", *rows, " " * indent + ")"])

    def imports(self) -> list[str]:
        stdlib = ["from functools import partial"] if "functools" in self._imported else []
        listed = {**self._imported, "safetensors.torch": {"load_file"}}
        listed.pop("functools", None)
        order = sorted(listed)
        return [
            *stdlib,
            "from pathlib import Path",
            "",
            "import torch",
            *(f"from {module} import {', '.join(sorted(listed[module]))}" for module in order),
        ]

    def _value(self, name: str, value: Any) -> str:
        if name not in CLASS_ARGUMENTS:
            return _text(tuples(value))
        if isinstance(value, str):
            return self.name(value)
        self._imported.setdefault("functools", set()).add("partial")
        options = ", ".join(f"{k}={_text(v)}" for k, v in value.items() if k != "name")
        return f"partial({self.name(value['name'])}, {options})"


def tuples(value: Any) -> Any:
    """The value with tuples in the place of JSON's lists."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value
