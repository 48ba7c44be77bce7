"""timm's VisionTransformer as plain data: read from the module itself, and built again.

The data is a constructor call and a few groups of parts to replace in what it returns. One comparison of the
module with its rebuilt twin (names, classes, shapes, every plain attribute) proves that nothing was missed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import timm
import torch
from timm.layers import (
    Attention,
    DiffAttention,
    DropPath,
    GluMlp,
    LayerScale,
    Mlp,
    PatchDropout,
    PatchEmbed,
    SwiGLU,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.saving import Description, SavedFamily, saved_families
from lightning_nas.supernet.families._timm_vit_source import CLASS_ARGUMENTS, CLASSES, source, tuples

_WITH_TIMM = (
    "model = timm.create_model(timm['name'], **timm['kwargs']); "
    "model.load_state_dict(safetensors.torch.load_file('model.safetensors')); model.eval()"
)
_WITH_SOURCE = "from network import load; model = load()  # needs timm, torch and safetensors"
_PRESETS = {  # the classes that an argument of create_model cannot say, and names of timm that use them
    "visiontransformer": "vit_tiny_patch16_224",
    "visiontransformerdistilled": "deit_tiny_distilled_patch16_224",
    "swiglupacked": "vit_giant_patch14_dinov2",
    "swiglu": "aimv2_large_patch14_224",
    "respostblock": "vit_base_patch16_rpn_224",
    "parallelthingsblock": "vit_small_patch16_18x2_224",
    "parallelscalingblock": "vit_base_patch16_xp_224",
    "diffparallelscalingblock": "vit_dpwee_patch16_reg1_gap_256",
}
_ALWAYS_SAID = (
    "img_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "global_pool",
    "embed_dim",
    "depth",
    "num_heads",
)
_REGULARIZERS = {nn.Identity, nn.Dropout, DropPath, PatchDropout}  # without effect in evaluation mode
_RATES = {"p", "drop_prob", "prob", "attn_drop_p"}
_NOT_COMPARED = {  # where it came from, how it was initialised, how it is trained
    "pretrained_cfg", "default_cfg", "pretrained_model_args", "_traits", "_model_args", "feature_info",
    "weight_init_mode", "fix_init", "init_values", "grad_checkpointing", "training",
}  # fmt: skip
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def supports(model: nn.Module) -> bool:
    """Whether the module is timm's plain or distilled VisionTransformer; a subclass may compute anything."""
    return type(model) in (VisionTransformer, VisionTransformerDistilled)


def describe(model: Any, shared: Mapping[str, str]) -> Description:
    """The constructor call, the parts to replace after it, and attributes to set; see :func:`build`.

    Raises:
        UnsupportedError: naming what could not be restored.
    """
    if type(model.patch_embed) is not PatchEmbed or model.patch_embed.img_size is None:
        raise UnsupportedError(
            f"nas.save: patch_embed is a {type(model.patch_embed).__name__} (img_size "
            f"{getattr(model.patch_embed, 'img_size', None)}); only timm's PatchEmbed with a size can be "
            "rebuilt."
        )
    names = [name for name, _ in model.blocks.named_children()]
    if not names or names != [str(i) for i in range(len(names))]:
        raise UnsupportedError(
            f"nas.save: the blocks must be named 0, 1, 2, ..., got {names} (slicing nn.Sequential keeps old "
            "names); set model.blocks = nn.Sequential(*model.blocks)."
        )
    arguments = _arguments(model)
    network: dict[str, Any] = {
        "class": _short(type(model), "the network"),
        "arguments": arguments,
        "parts": _parts(model, arguments),
        "fused_attn": next((bool(m.fused_attn) for m in model.modules() if hasattr(m, "fused_attn")), True),
        "attributes": {},
        "blocks": [
            {
                "heads": {path or "block": m.num_heads for path, m in _attentions(b)},
                "mlp": {path or "block": _width(m) for path, m in _mlps(b)},
            }
            for b in model.blocks
        ],
        "head_size": next(m.head_dim for _, m in _attentions(model.blocks[0])),
        "pretrained_cfg": _pretrained_cfg(model),
    }
    try:
        with torch.device("meta"):
            built = build(network)
    except Exception as error:
        raise UnsupportedError(
            f"nas.save: timm {timm.__version__} cannot build the network that was read from the module "
            f"({type(error).__name__}: {error}); its parts may not fit together."
        ) from error
    network["attributes"] = _differences(model, built)
    # timm's constructor makes separate parameters.
    call = None if shared else _create_model_call(model, network)
    if call:
        return Description(network, _WITH_TIMM, entries={"timm": call})
    return Description(
        network, _WITH_SOURCE, files={"network.py": source(network, shared)}, entries={"timm": None}
    )


def build(network: Mapping[str, Any]) -> nn.Module:
    """The network that :func:`describe` described, its weights still to be loaded."""
    model: Any = _class(network["class"])(**_decoded(network["arguments"]))
    for part in network["parts"]:
        for path, value in part["values"].items():
            made = _class(part["make"])(**_decoded(part["arguments"]), **{part["varies"]: value})
            model.set_submodule(path, made)
    _set_fused(model, network["fused_attn"])
    for name, value in network["attributes"].items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, value)
    if network["pretrained_cfg"]:
        model.pretrained_cfg = model.default_cfg = {
            k: tuples(v) for k, v in network["pretrained_cfg"].items()
        }
    return model  # type: ignore[no-any-return]  # timm classes are looked up by name


# --- reading the module


def _arguments(model: VisionTransformer) -> dict[str, Any]:
    """The constructor's arguments; where blocks differ, those of which most blocks need no replacement."""
    block = model.blocks[0]
    attention, mlp = next(_attentions(block))[1], next(_mlps(block))[1]
    proj = next(
        m for n in ("proj", "attn_out_proj", "out_proj") if (m := getattr(attention, n, None)) is not None
    )
    pool = model.attn_pool
    width, heads = int(model.embed_dim), _constructor_heads(model)
    widths = [_width(m) for b in model.blocks for _, m in _mlps(b)]
    mlp_width = pool.mlp.fc1.out_features if getattr(pool, "mlp", None) is not None else max(widths)
    has_fc_norm = _present(model.fc_norm)
    default_fc_norm = model.global_pool in ("avg", "avgmax", "max")
    _, rates = _drop_path(model)
    found = {
        "img_size": _size(model.patch_embed.img_size),
        "patch_size": _size(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": width,
        "depth": len(model.blocks),
        "num_heads": heads,
        "mlp_ratio": _ratio(mlp_width, width),
        "qkv_bias": (attention.in_proj if _is_parallel(block) else attention.qkv).bias is not None,
        "qk_norm": _present(attention.q_norm),
        "scale_attn_norm": not _is_parallel(block) and _present(attention.norm),
        "scale_mlp_norm": not _is_parallel(block) and _present(mlp.norm),
        "proj_bias": proj.bias is not None,
        "init_values": _init_values(block),
        "class_token": model.has_class_token,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": _present(model.norm_pre),
        "final_norm": _present(model.norm) or has_fc_norm,
        "fc_norm": None
        if has_fc_norm == default_fc_norm or not (_present(model.norm) or has_fc_norm)
        else has_fc_norm,
        "pool_include_prefix": model.pool_include_prefix and model.global_pool != "prr",
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
        "proj_drop_rate": (attention.mlp_drop if _is_parallel(block) else attention.proj_drop).p,
        "attn_drop_rate": attention.attn_drop.p,
        "drop_path_rate": rates,
        "embed_norm_layer": _norm(model.patch_embed.norm, "patch_embed.norm"),
        "norm_layer": _norm(_first_norm(block), "blocks.0"),
        "act_layer": _short(type(_act(mlp)), "the activation of blocks.0"),
        "block_fn": _block_fn(block),
        "mlp_layer": None if _is_parallel(block) else _mlp_layer(mlp),
        "attn_layer": "diff" if isinstance(attention, DiffAttention) else None,
    }
    defaults = {name: p.default for name, p in inspect.signature(VisionTransformer).parameters.items()}
    return {k: v for k, v in found.items() if k in _ALWAYS_SAID or (v is not None and v != defaults.get(k))}


def _parts(model: VisionTransformer, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the constructor makes in another size than the module has: groups that differ in one argument."""
    width, heads = arguments["embed_dim"], arguments["num_heads"]
    mlp_width = int(width * arguments.get("mlp_ratio", 4.0))
    attentions = {
        f"blocks.{i}.{p}".rstrip("."): m for i, b in enumerate(model.blocks) for p, m in _attentions(b)
    }
    mlps = {f"blocks.{i}.{p}".rstrip("."): m for i, b in enumerate(model.blocks) for p, m in _mlps(b)}
    rows: list[tuple[str, dict[str, Any], str, str, Any]] = []
    if any(_is_parallel(b) for b in model.blocks):
        if any(_width(b) != mlp_width for b in model.blocks if _is_parallel(b)):
            for path, block in attentions.items():
                made = _short(type(block), path)
                rows.append(
                    (
                        made,
                        _parallel_arguments(block, arguments),
                        "mlp_ratio",
                        path,
                        _ratio(_width(block), width),
                    )
                )
    else:
        plain = {path: m for path, m in attentions.items() if type(m) is Attention}
        if any(
            (m.num_heads, m.head_dim) != (heads, width // heads) or m.gate is not None for m in plain.values()
        ):
            for path, m in plain.items():
                rows.append(
                    ("attention", _attention_arguments(m, width, path), "num_heads", path, m.num_heads)
                )
        if any(_width(m) != mlp_width for m in mlps.values()):
            for path, m in mlps.items():
                rows.append(
                    (
                        _short(type(m), path),
                        _mlp_arguments(m, width, path),
                        "hidden_features",
                        path,
                        _width(m),
                    )
                )
    ramp_holds, _ = _drop_path(model)
    if not ramp_holds or any(_is_parallel(model.get_submodule(path)) for _, _, _, path, _ in rows):
        rows += [
            ("droppath", {}, "drop_prob", path, rate)
            for path, rate in _drop_path_rates(model).items()
            if rate
        ]
    groups: dict[str, dict[str, Any]] = {}
    for make, common, varies, path, value in rows:
        part = {"make": make, "arguments": common, "varies": varies, "values": {}}
        groups.setdefault(json.dumps(part), part)["values"][path] = value
    return list(groups.values())


def _attention_arguments(attention: Attention, width: int, path: str) -> dict[str, Any]:
    norm = next((m for m in (attention.q_norm, attention.norm) if _present(m)), None)
    return _said(
        dim=width,
        attn_head_dim=attention.head_dim,
        qkv_bias=attention.qkv.bias is not None,
        qk_norm=_present(attention.q_norm),
        scale_norm=_present(attention.norm),
        proj_bias=None if attention.proj.bias is not None else False,
        gated=attention.gate is not None,
        attn_drop=attention.attn_drop.p,
        proj_drop=attention.proj_drop.p,
        norm_layer=_norm(norm, path) if norm is not None else None,
    )


def _mlp_arguments(mlp: Any, width: int, path: str) -> dict[str, Any]:
    return _said(
        in_features=width,
        act_layer=_short(type(mlp.act), path),
        norm_layer=_norm(mlp.norm, path),
        bias=None if mlp.fc2.bias is not None else False,
        drop=mlp.drop1.p,
        gate_last=False if getattr(mlp, "gate_last", True) is False else None,
    )


def _parallel_arguments(block: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    names = ("qkv_bias", "qk_norm", "proj_bias", "init_values", "act_layer", "norm_layer")
    return {
        "dim": arguments["embed_dim"],
        "num_heads": block.num_heads,
        "qkv_bias": arguments.get("qkv_bias", True),
        **{name: arguments[name] for name in names if name in arguments},
        **_said(attn_drop=arguments.get("attn_drop_rate"), proj_drop=arguments.get("proj_drop_rate")),
        **_block_options(block),
    }


def _said(**values: Any) -> dict[str, Any]:
    """Without those that are off: None, zero, or False where that is timm's default."""
    off_by_default = ("qkv_bias", "qk_norm", "scale_norm", "gated", "fuse_out_proj", "dual_lambda")
    return {
        k: v for k, v in values.items() if v is not None and (v or (v is False and k not in off_by_default))
    }


def _attentions(block: Any) -> Iterator[tuple[str, Any]]:
    """Where a block's attention is; the block itself where it computes attention and MLP in one."""
    if hasattr(block, "attns"):
        yield from ((f"attns.{i}.attn", part.attn) for i, part in enumerate(block.attns))
    else:
        yield ("", block) if _is_parallel(block) else ("attn", block.attn)


def _mlps(block: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(block, "ffns"):
        yield from ((f"ffns.{i}.mlp", part.mlp) for i, part in enumerate(block.ffns))
    else:
        yield ("", block) if _is_parallel(block) else ("mlp", block.mlp)


def _is_parallel(block: nn.Module) -> bool:
    return hasattr(block, "in_split")


def _width(mlp: Any) -> int:
    if _is_parallel(mlp):
        return int(mlp.in_split[0])
    return int((mlp.fc1_g if isinstance(mlp, SwiGLU) else mlp.fc1).out_features)


def _ratio(width: int, dim: int) -> float:
    """A ratio for which timm's ``int(dim * ratio)`` is exactly ``width``."""
    ratio = width / dim
    return ratio if int(dim * ratio) == width else (width + 0.5) / dim


def _constructor_heads(model: VisionTransformer) -> int:
    attention = next(_attentions(model.blocks[0]))[1]
    if getattr(model.attn_pool, "num_heads", None):
        return int(model.attn_pool.num_heads)
    if type(attention) is not Attention:
        return int(attention.num_heads)
    return model.embed_dim // attention.head_dim if model.embed_dim % attention.head_dim == 0 else 1


def _act(mlp: Any) -> nn.Module:
    act: nn.Module = mlp.mlp_act if _is_parallel(mlp) else mlp.act
    return act


def _init_values(block: Any) -> float | None:
    if hasattr(block, "init_values"):
        return block.init_values  # type: ignore[no-any-return]  # of ResPostBlock, a float or None
    scale = block.attns[0].ls if hasattr(block, "attns") else block.ls if _is_parallel(block) else block.ls1
    return scale.init_values if isinstance(scale, LayerScale) else None


def _first_norm(block: Any) -> nn.Module:
    norm: nn.Module = (
        block.attns[0].norm if hasattr(block, "attns") else getattr(block, "norm1", None) or block.in_norm
    )
    return norm


def _block_options(block: Any) -> dict[str, Any]:
    return _said(
        num_parallel=block.num_parallel if getattr(block, "num_parallel", 2) != 2 else None,
        fuse_out_proj=type(block).__name__ == "ParallelScalingBlock" and block.out_proj is not None,
        dual_lambda=getattr(block, "dual_lambda", False),
    )


def _block_fn(block: nn.Module) -> str | dict[str, Any] | None:
    name, options = _short(type(block), "blocks.0"), _block_options(block)
    if name == "block":
        return None
    return {"name": name, **options} if options else name


def _mlp_layer(mlp: Any) -> str | None:
    if type(mlp) is Mlp:
        return None
    return (
        "swiglupacked"
        if type(mlp) is GluMlp and not mlp.gate_last
        else _short(type(mlp), "the MLP of blocks.0")
    )


def _norm(norm: Any, where: str) -> dict[str, Any] | None:
    return {"name": _short(type(norm), where), "eps": norm.eps} if _present(norm) else None


def _present(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)


def _drop_path_rates(model: VisionTransformer) -> dict[str, float]:
    names = ("drop_path", "drop_path1", "drop_path2")
    return {
        path: float(getattr(module, "drop_prob", 0.0) or 0.0)
        for path, module in model.named_modules()
        if path.startswith("blocks.") and path.rpartition(".")[2] in names
    }


def _drop_path(model: VisionTransformer) -> tuple[bool, float]:
    """Whether the blocks' rates are timm's linear ramp, and the rate at its end."""
    rates, last = _drop_path_rates(model), len(model.blocks) - 1
    end = round(max(rates.values(), default=0.0), 7)
    ramp = {path: end * int(path.split(".")[1]) / max(last, 1) for path in rates}
    holds = all(abs(rates[path] - ramp[path]) < 1e-6 for path in rates)
    return (True, end) if holds else (False, 0.0)


def _size(pair: tuple[int, int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)


def _pretrained_cfg(model: VisionTransformer) -> dict[str, Any] | None:
    """Preprocessing and origin, with today's input size; None for a network made without ``create_model``.

    Without the addresses of the original weights, which are not those of this network.
    """
    original = getattr(model, "pretrained_cfg", None)
    if not original:
        return None
    addresses = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load")
    known = {k: list(v) if isinstance(v, tuple) else v for k, v in original.items() if k not in addresses}
    size = [model.patch_embed.proj.in_channels, *model.patch_embed.img_size]
    known = {**known, "input_size": size, "num_classes": model.num_classes}
    return {k: v for k, v in known.items() if v is not None and _is_plain(v)}


# --- names and values


def _short(cls: type, where: str) -> str:
    for name, dotted in CLASSES.items():
        if _exists(dotted) is cls:
            return name
    raise UnsupportedError(
        f"nas.save: {where} uses {cls.__module__}.{cls.__qualname__}, which cannot be rebuilt by name; known "
        f"are {', '.join(sorted(dotted.rpartition('.')[2] for dotted in CLASSES.values()))}."
    )


def _exists(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(import_module(module), name, None)  # not every supported timm has every class


def _class(name: str) -> Any:
    found = _exists(CLASSES[name])
    if found is None:
        raise ValueError(f"{CLASSES[name]} is not in timm {timm.__version__}")
    return found


def _decoded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    def value_of(name: str, value: Any) -> Any:
        if name not in CLASS_ARGUMENTS or value is None:
            return tuples(value)
        if isinstance(value, str):
            return _class(value)
        return partial(_class(value["name"]), **{k: v for k, v in value.items() if k != "name"})

    return {name: value_of(name, value) for name, value in arguments.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _set_fused(model: nn.Module, fused: bool) -> None:
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


# --- proof that nothing was missed


def _differences(model: nn.Module, built: nn.Module) -> dict[str, Any]:
    """Plain attributes in which the module differs from its rebuilt twin.

    Raises:
        UnsupportedError: if they differ in anything else.
    """
    ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (model, built))
    for path in [*ours, *theirs]:
        mine, other = ours.get(path), theirs.get(path)
        if type(mine) is not type(other) and not {type(mine), type(other)} <= _REGULARIZERS:
            raise UnsupportedError(
                f"nas.save: {path!r} is {_kind(mine)}, but timm's constructor makes it {_kind(other)}; "
                "a network changed in this way cannot be rebuilt."
            )
    shapes, twins = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (model, built))
    for name in [*shapes, *twins]:
        if shapes.get(name) != twins.get(name):
            raise UnsupportedError(
                f"nas.save: {name!r} has the shape {shapes.get(name)}, the rebuilt network has "
                f"{twins.get(name)}; a network changed in this way cannot be rebuilt."
            )
    changed: dict[str, Any] = {}
    for path, module in ours.items():
        twin = vars(theirs[path])
        if type(module) is not type(theirs[path]):
            continue
        for attribute, value in vars(module).items():
            if attribute in _OF_EVERY_MODULE or attribute in _NOT_COMPARED:
                continue
            name = f"{path}.{attribute}".lstrip(".")
            if _is_plain(value):
                if attribute not in twin or twin[attribute] != value:
                    changed[name] = value
            elif (
                not attribute.startswith("_")
                and twin.get(attribute) is not value
                and not _equal(twin, attribute, value)
            ):
                raise UnsupportedError(
                    f"nas.save: the attribute {name!r} ({type(value).__name__}) was set on the module and "
                    "cannot be stored; remove it, or make it a buffer."
                )
    return changed


def _equal(twin: Mapping[str, Any], attribute: str, value: Any) -> bool:
    other = twin.get(attribute)
    return type(other) is type(value) and not isinstance(value, torch.Tensor) and bool(other == value)


def _kind(module: nn.Module | None) -> str:
    return "absent" if module is None else f"a {type(module).__name__}"


def _create_model_call(model: nn.Module, network: Mapping[str, Any]) -> dict[str, Any] | None:
    """Name and arguments for ``timm.create_model``, tried and compared; None where there are none."""
    if any(part["make"] != "droppath" for part in network["parts"]):
        return None
    found = network["arguments"]
    said = {k: v for k, v in found.items() if k not in CLASS_ARGUMENTS}
    if rate := max(_drop_path_rates(model).values(), default=0.0):
        said["drop_path_rate"] = round(rate, 7)
    if found["norm_layer"]["name"] != "layernorm":  # timm's default
        said["norm_layer"] = found["norm_layer"]["name"]
    if "embed_norm_layer" in found:
        said["embed_norm_layer"] = found["embed_norm_layer"]["name"]
    if found["act_layer"] != "gelu":
        said["act_layer"] = found["act_layer"].removeprefix("timm_")
    # A name may bring settings of its own; then every other one has to be said as well.
    # create_model drops arguments that are None, and 0 means no LayerScale too.
    all_said = {**_plain_defaults(), "init_values": 0.0, **said, "norm_layer": found["norm_layer"]["name"]}
    cfg = network["pretrained_cfg"] or {}
    own = ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))
    preset = _PRESETS.get(str(found.get("block_fn") or found.get("mlp_layer") or network["class"]))
    for name, arguments in product(filter(None, (own, preset)), (said, all_said)):
        try:
            with torch.device("meta"):
                built = timm.create_model(name, **arguments)
            _set_fused(built, True)
            left = _differences(model, built)
        except Exception:  # an entry point that takes other arguments, or builds something else
            continue
        if all(attribute.rpartition(".")[2] in _RATES for attribute in left):
            return {"name": name, "kwargs": arguments}
    return None


def _plain_defaults() -> dict[str, Any]:
    initialisation = ("weight_init", "fix_init", "device", "dtype")
    parameters = inspect.signature(VisionTransformer).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.name not in (*CLASS_ARGUMENTS, *initialisation)
        and p.default not in (p.empty, None)
        and _is_plain(p.default)
    }


saved_families.register("timm_vit")(
    SavedFamily("timm's VisionTransformer and VisionTransformerDistilled", "timm", supports, describe, build)
)
