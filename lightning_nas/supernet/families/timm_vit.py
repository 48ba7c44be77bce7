"""timm's VisionTransformer and its distilled DeiT form: what of them is elastic, and their spaces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import GluMlp, LayerNorm, LayerScale, Mlp, PatchEmbed, SwiGLU
from timm.layers.norm import LayerNormFp32, RmsNorm, RmsNormFp32
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.registry import nearest
from lightning_nas.space import Choice, Depth, SearchSpace
from lightning_nas.supernet.anatomy import Anatomy, Axis, Group, Operation, Part, Segment, Sizes, axis_length
from lightning_nas.supernet.families import families

__all__ = ["TimmViT", "vit_space"]

BLOCKS = (Block, ResPostBlock, ParallelThingsBlock, ParallelScalingBlock)
MLPS = (Mlp, GluMlp, SwiGLU)
NORMS = (LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32, nn.LayerNorm)

PRESETS = {  # absolute values: of the whole network (blocks, heads, MLP), and the options of each
    "instatune": ((12, 12, 3072), {"depth": (11, 12), "heads": (6, 8, 10, 12), "mlp": (2048, 2560, 3072)}),
    "dynast": ((12, 12, 3072), {"depth": (10, 11, 12), "heads": (6, 8, 10, 12), "mlp": (1024, 2048, 3072)}),
}


class TimmViT:
    """Adapter of timm's vision transformers.

    Elastic: ``"depth"``, ``"layers.{i}.heads"``, ``"layers.{i}.mlp"`` (or ``"heads"`` and ``"mlp"``, one
    value for all blocks), and ``"embed"``, the width of the embedding. Parallel branches of a block share its
    choices; each is ordered for itself. The heads of a ``ParallelScalingBlock``, which reshapes to the full
    width, stay whole, and so does attention pooling: ``"embed"`` goes with neither, nor with a stem other
    than timm's ``PatchEmbed``.
    """

    name = "timm_vit"

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a vision transformer.

        Raises:
            UnsupportedError: for a block, attention, MLP or linear layer of a class not known here.
        """
        return _Description(model).anatomy()

    def space(self, model: nn.Module, preset: str, **options: Any) -> SearchSpace:
        """A preset: ``"relative"``, or the absolute values of ``"instatune"`` and ``"dynast"``.

        Args:
            model: the vision transformer.
            preset: its name.
            **options: of :func:`vit_space`, in place of the preset's.

        Raises:
            ValueError: for an unknown name, or absolute values that are not this network's.
        """
        if preset == "relative":
            return vit_space(model, **options)
        if preset not in PRESETS:
            raise ValueError(f"Unknown space {preset!r}. {nearest(preset, ('relative', *PRESETS))}")
        needed, values = PRESETS[preset]
        limits = self.anatomy(model).limits
        own = (limits["depth"], limits.get("heads", 0), limits.get("mlp", 0))
        if own != needed:
            raise ValueError(
                f"The space {preset!r} is for {needed[0]} blocks of {needed[1]} heads and {needed[2]} MLP "
                f"units; this network has {own[0]}, {own[1]} and {own[2]}. Use space='relative' or "
                "nas.supernet.default_space(model, heads=..., mlp=..., depth=...)."
            )
        return vit_space(model, **{"keep": "first", **values, **options})

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Renumber the kept blocks and correct what timm records about the network."""
        blocks: Any = model.blocks
        if len(kept) < len(blocks):
            short = nn.Sequential(*(blocks[i] for i in kept))
            short.training = blocks.training
            model.blocks = short
        width = int(sizes["embed"])
        model.feature_info = [  # type: ignore[assignment]
            {**info, "num_chs": width}
            for info in model.feature_info[: len(kept)]  # type: ignore[index, union-attr]
        ]
        arguments = getattr(model, "_model_args", None)
        if arguments:
            model._model_args = {**arguments, "depth": len(kept), "embed_dim": width}  # type: ignore[assignment]

    def unfuse(self, model: nn.Module) -> None:
        """Attention as two matrix products, which operation counters see."""
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]

    def output(self, model: nn.Module, batch: Any) -> Any:
        """Of a tuple the network takes the first element; the rest (labels) is the loss's."""
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(batch[0] if isinstance(batch, Sequence) else batch)

    def tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Blocks take the tokens first."""
        tokens: Tensor = args[0] if args else kwargs["x"]
        return tokens


for _network in (VisionTransformer, VisionTransformerDistilled):
    families.register(f"{_network.__module__}.{_network.__qualname__}")(TimmViT())


def vit_space(
    model: nn.Module,
    *,
    heads: Sequence[float | int] | None = (0.25, 0.5, 0.75, 1.0),
    mlp: Sequence[float | int] | None = (0.25, 0.5, 0.75, 1.0),
    depth: Sequence[float | int] | None = None,
    keep: str | Mapping[int, Sequence[int]] = "spread",
    embed: Sequence[float | int] | None = None,
    shared: bool = False,
) -> SearchSpace:
    """A space for a vision transformer; its defaults are the preset ``"relative"``.

    Options are shares of the network's own value where they are floats, and absolute where they are ints.
    Shares are rounded to whole units, at least one. A choice that would only say "whole" is left out.

    Args:
        model: the vision transformer.
        heads: options for the heads of each block; None: whole.
        mlp: options for the MLP units of each block; None: whole.
        depth: options for the number of blocks that run; None: all from two thirds up; ``()``: whole.
        keep: which blocks run: ``"spread"`` drops blocks evenly spaced behind the first one, ``"first"``
            keeps the first ones, a mapping gives for each depth the indices kept.
        embed: options for the embedding width; None: whole.
        shared: one choice ``"heads"`` and one ``"mlp"`` for all blocks, in place of one each.

    Returns:
        The space.

    Raises:
        ValueError: for a share outside (0, 1], or an unknown ``keep``.
    """
    anatomy = _Description(model).anatomy()
    total = len(anatomy.blocks)
    chosen = (
        tuple(range(math.ceil(total * 2 / 3), total + 1))
        if depth is None
        else _options("depth", depth, total)
    )
    kept = tuple(_kept(keep, d, total) for d in chosen)
    choices: list[Choice] = [] if chosen in ((), (total,)) else [Depth("depth", chosen, keeps=kept)]
    runs = set().union(*kept) if choices else set(range(total))
    wanted = {"heads": heads, "mlp": mlp, "embed": embed}
    for name, limit in anatomy.limits.items():
        _, *block = name.split(".")  # layers.3.heads is of block 3; heads, of all of them
        what = name.rpartition(".")[2]
        is_offered = int(block[0]) in runs and not shared if block else shared or what == "embed"
        if what == "depth" or not is_offered:
            continue
        options = _options(what, wanted[what] or (), limit)
        if options not in ((), (limit,)):
            choices.append(Choice(name, options))
    return SearchSpace(choices)


def _options(what: str, options: Sequence[float | int], limit: int) -> tuple[int, ...]:
    for option in options:
        if not (0 < option <= 1 if isinstance(option, float) else 1 <= option <= limit):
            raise ValueError(
                f"vit_space: {what} cannot be {option!r}; give a float in (0, 1] for a share, or an int from "
                f"1 to {limit}, which is all that this network has."
            )
    return tuple(sorted({max(1, round(o * limit)) if isinstance(o, float) else int(o) for o in options}))


def _kept(keep: str | Mapping[int, Sequence[int]], depth: int, total: int) -> tuple[int, ...]:
    if isinstance(keep, Mapping):
        if depth not in keep:
            raise ValueError(
                f"vit_space: keep must name the blocks for depth {depth}, got depths {sorted(keep)}."
            )
        return tuple(keep[depth])
    if keep == "first":
        return tuple(range(depth))
    if keep != "spread":
        raise ValueError(f"vit_space: keep must be 'spread', 'first' or a mapping, got {keep!r}.")
    out = total - depth
    dropped = {1 + int((j + 0.5) * (total - 1) / out) for j in range(out)}
    return tuple(i for i in range(total) if i not in dropped)


class _Description:
    """Reads one model into its anatomy, collecting groups, parts and operations block by block."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        width: Any = model.embed_dim
        self.width = Segment(width, group="embed")
        self.groups: dict[str, Group] = {}
        self.parts: list[Part] = []
        self.operations: list[Operation] = []
        self.can_narrow = type(self.model.patch_embed) is PatchEmbed and self.model.attn_pool is None

    def anatomy(self) -> Anatomy:
        model = self.model
        blocks = tuple(f"blocks.{i}" for i in range(len(model.blocks)))
        for i, block in enumerate(model.blocks):
            self._known(blocks[i], block, BLOCKS, "block")
            self._block(i, block)
        self._stem_and_head()
        narrow = ("embed",) if self.can_narrow else ()
        self.groups["embed"] = Group("embed", model.embed_dim, narrow, ("embed",))
        return Anatomy(blocks, self.groups, tuple(self.parts), tuple(self.operations))

    def _stem_and_head(self) -> None:
        model, one = self.model, (Segment(1),)
        names = ("cls_token", "dist_token", "reg_token", "pos_embed")
        tokens = {name: model._parameters[name] for name in names if model._parameters.get(name) is not None}
        width = partial(axis_length, (self.width,))
        self.parts.append(
            Part(
                "",
                {name: (one, (Segment(token.shape[1]),), (self.width,)) for name, token in tokens.items()},
                dict.fromkeys(("embed_dim", "num_features", "head_hidden_size"), width),
            )
        )
        if not self.can_narrow:
            return
        conv = model.patch_embed.proj
        rest = tuple((Segment(length),) for length in conv.weight.shape[1:])
        axes = {"weight": ((self.width,), *rest)} | ({} if conv.bias is None else {"bias": ((self.width,),)})
        self.parts.append(Part("patch_embed.proj", axes, {"out_channels": width}))
        for name in ("patch_embed.norm", "norm_pre", "norm", "fc_norm"):
            self._norm(name, model.get_submodule(name), (self.width,))
        ends = (model.norm, model.fc_norm, model.head)
        if all(isinstance(end, nn.Identity) for end in ends):
            self.can_narrow = (
                False  # nothing bounds the features that leave: masked, they would not be zero beyond
            )
        for name in ("head", "head_dist"):
            layer = getattr(model, name, None)
            if type(layer) is nn.Linear:
                self._linear(None, name, layer, (Segment(layer.out_features),), (self.width,))
            elif not isinstance(layer, nn.Identity | None):
                self.can_narrow = False

    def _block(self, i: int, block: Any) -> None:
        name = f"blocks.{i}"
        if isinstance(block, ParallelScalingBlock):
            self._scaling_block(i, block)
        elif isinstance(block, ParallelThingsBlock):
            for j, branch in enumerate(block.attns):
                self._attention(i, f"{name}.attns.{j}.attn", branch.attn, f".attns.{j}")
                self._beside(f"{name}.attns.{j}", branch, ("norm", "ls"))
            for j, branch in enumerate(block.ffns):
                self._mlp(i, f"{name}.ffns.{j}.mlp", branch.mlp, f".ffns.{j}")
                self._beside(f"{name}.ffns.{j}", branch, ("norm", "ls"))
        else:
            self._attention(i, f"{name}.attn", block.attn)
            self._mlp(i, f"{name}.mlp", block.mlp)
            self._beside(name, block, ("norm1", "ls1", "norm2", "ls2"))

    def _attention(self, i: int, name: str, attention: Any, branch: str = "") -> None:
        self._known(name, attention, (Attention,), "attention")
        if not hasattr(attention, "attn_dim"):
            raise UnsupportedError(
                "Supernet: this timm cannot run attention with fewer heads; install a newer timm."
            )
        group = self._group(i, "heads", branch, attention.num_heads, name, f"{name}.proj")
        heads = Segment(attention.num_heads, attention.head_dim, group)
        self.parts.append(
            Part(
                name,
                attributes={
                    "num_heads": partial(axis_length, (Segment(attention.num_heads, 1, group),)),
                    "attn_dim": partial(axis_length, (heads,)),
                },
            )
        )
        self._linear(i, f"{name}.qkv", attention.qkv, (heads, heads, heads), (self.width,))
        if getattr(attention, "gate", None) is not None:
            self._linear(i, f"{name}.gate", attention.gate, (heads,), (self.width,))
        self._norm(f"{name}.norm", attention.norm, (heads,))
        self._linear(i, f"{name}.proj", attention.proj, (self.width,), (heads,))
        self.operations += [Operation(i, "pair", ((heads,),))] * 2

    def _mlp(self, i: int, name: str, mlp: Any, branch: str = "") -> None:
        self._known(name, mlp, MLPS, "MLP")
        units = mlp.fc2.weight.shape[1]
        group = self._group(i, "mlp", branch, units, name, f"{name}.fc2")
        hidden = Segment(units, 1, group)
        if isinstance(mlp, SwiGLU):
            self._linear(i, f"{name}.fc1_g", mlp.fc1_g, (hidden,), (self.width,))
            self._linear(i, f"{name}.fc1_x", mlp.fc1_x, (hidden,), (self.width,))
        else:
            self._linear(
                i, f"{name}.fc1", mlp.fc1, (hidden,) * (2 if isinstance(mlp, GluMlp) else 1), (self.width,)
            )
        self._norm(f"{name}.norm", mlp.norm, (hidden,))
        self._linear(i, f"{name}.fc2", mlp.fc2, (self.width,), (hidden,))

    def _scaling_block(self, i: int, block: Any) -> None:
        name = f"blocks.{i}"
        self.can_narrow = False
        units, width = block.in_split[0], Segment(self.model.embed_dim)
        fused = block.out_proj is not None
        group = self._group(
            i, "mlp", "", units, f"{name}.mlp", f"{name}.out_proj" if fused else f"{name}.mlp_out_proj"
        )
        hidden = Segment(units, 1, group)
        rest = block.in_split[1:]
        self.parts.append(
            Part(
                name,
                {} if block.mlp_bias is None else {"mlp_bias": ((hidden,),)},
                {"in_split": lambda sizes: [int(hidden.used(sizes)), *rest]},
            )
        )
        self._linear(i, f"{name}.in_proj", block.in_proj, (hidden, width, width, width), (width,))
        if fused:
            self._linear(i, f"{name}.out_proj", block.out_proj, (width,), (width, hidden))
        else:
            self._linear(i, f"{name}.attn_out_proj", block.attn_out_proj, (width,), (width,))
            self._linear(i, f"{name}.mlp_out_proj", block.mlp_out_proj, (width,), (hidden,))
        self.operations += [Operation(i, "pair", ((width,),))] * 2

    def _group(self, i: int, what: str, branch: str, units: int, target: str, way_out: str) -> str:
        name = f"layers.{i}{branch}.{what}"
        targets = (f"blocks.{i}", target, *((target.rpartition(".")[0],) if branch else ()))
        self.groups[name] = Group(name, units, (f"layers.{i}.{what}", what), targets, (way_out, "weight"))
        return name

    def _linear(self, i: int | None, name: str, layer: Any, rows: Axis, columns: Axis) -> None:
        self._known(name, layer, (nn.Linear,), "linear layer")
        axes = {"weight": (rows, columns)} | ({} if layer.bias is None else {"bias": (rows,)})
        attributes = {
            "out_features": partial(axis_length, rows),
            "in_features": partial(axis_length, columns),
        }
        self.parts.append(Part(name, axes, attributes))
        if i is not None:
            self.operations.append(Operation(i, "token", (rows, columns)))

    def _beside(self, name: str, owner: Any, members: tuple[str, ...]) -> None:
        for member in members:
            module = getattr(owner, member, None)
            if type(module) is LayerScale:
                self.parts.append(Part(f"{name}.{member}", {"gamma": ((self.width,),)}))
            elif module is not None:
                self._norm(f"{name}.{member}", module, (self.width,))

    def _norm(self, name: str, norm: nn.Module, axis: Axis) -> None:
        if isinstance(norm, nn.Identity):
            return
        if type(norm) not in NORMS:
            if axis == (self.width,):
                self.can_narrow = False
                return
            self._known(name, norm, NORMS, "norm")
        axes = {n: (axis,) for n, parameter in norm.named_parameters(recurse=False) if parameter is not None}
        self.parts.append(
            Part(name, axes, {"normalized_shape": lambda sizes: (int(axis_length(axis, sizes)),)})
        )

    def _known(self, name: str, module: Any, classes: tuple[type, ...], what: str) -> None:
        if type(module) not in classes or (type(module) is nn.Linear and "weight" not in module._parameters):
            raise UnsupportedError(
                f"Supernet: {name} is a {type(module).__module__}.{type(module).__qualname__}, a {what} that "
                f"cannot be sliced. Supported: {', '.join(cls.__name__ for cls in classes)}."
            )
