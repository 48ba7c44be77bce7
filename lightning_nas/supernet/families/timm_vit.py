"""timm's VisionTransformer and its distilled DeiT form: what of them is elastic, and their spaces."""

from __future__ import annotations

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
from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet.adapter import Adapter, Reader, length
from lightning_nas.supernet.anatomy import Anatomy, Axis, Segment, Sizes
from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._presets import DYNAST, INSTATUNE
from lightning_nas.supernet.layers import plain_class

__all__ = ["TimmViT"]

BLOCKS = (Block, ResPostBlock, ParallelThingsBlock, ParallelScalingBlock)
MLPS = (Mlp, GluMlp, SwiGLU)
NORMS = (LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32, nn.LayerNorm)


class TimmViT(Adapter):
    """Adapter of timm's vision transformers.

    Elastic: ``"depth"``, ``"layers.{i}.heads"``, ``"layers.{i}.mlp"`` (or ``"heads"`` and ``"mlp"``, one
    value for all blocks), and ``"embed"``, the width of the embedding. Parallel branches of a block share its
    choices; each is ordered for itself. The heads of a ``ParallelScalingBlock``, which reshapes to the full
    width, stay whole, and so does attention pooling: ``"embed"`` goes with neither, nor with a stem other
    than timm's ``PatchEmbed``.
    """

    name = "timm_vit"
    presets = {"instatune": INSTATUNE, "dynast": DYNAST}  # noqa: RUF012

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a vision transformer.

        Raises:
            UnsupportedError: for a block, attention, MLP or linear layer of a class not known here.
        """
        return _ViT(model).anatomy()

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Correct what timm records about the network."""
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


for _network in (VisionTransformer, VisionTransformerDistilled):
    families.register(f"{_network.__module__}.{_network.__qualname__}")(TimmViT())


class _ViT(Reader):
    """Reads one vision transformer, block by block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.width: Axis = (Segment(self.model.embed_dim, group="embed"),)
        self.can_narrow = type(self.model.patch_embed) is PatchEmbed and self.model.attn_pool is None

    def anatomy(self) -> Anatomy:
        for i, name in enumerate(self.stage("blocks")):
            self._block(i, name, self.known(name, BLOCKS, "block"))
        self._stem_and_head()
        self.group("embed", self.model.embed_dim, ("embed",) if self.can_narrow else (), ("embed",))
        return super().anatomy()

    def _stem_and_head(self) -> None:
        model, one = self.model, (Segment(1),)
        names = ("cls_token", "dist_token", "reg_token", "pos_embed")
        tokens = {name: model._parameters[name] for name in names if model._parameters.get(name) is not None}
        width = length(self.width)
        self.part(
            "",
            {name: (one, (Segment(token.shape[1]),), self.width) for name, token in tokens.items()},
            dict.fromkeys(("embed_dim", "num_features", "head_hidden_size"), width),
        )
        if not self.can_narrow:
            return
        conv = model.patch_embed.proj
        rest = tuple((Segment(size),) for size in conv.weight.shape[1:])
        self.part(
            "patch_embed.proj",
            {"weight": (self.width, *rest), "bias": (self.width,)},
            {"out_channels": width},
        )
        self.operation("patch_embed.proj", "position", self.width, *rest)
        for name in ("patch_embed.norm", "norm_pre", "norm", "fc_norm"):
            self._norm(name, model.get_submodule(name), self.width)
        ends = (model.norm, model.fc_norm, model.head)
        if all(isinstance(end, nn.Identity) for end in ends):
            self.can_narrow = (
                False  # nothing bounds the features that leave: masked, they would not be zero beyond
            )
        for name in ("head", "head_dist"):
            layer = getattr(model, name, None)
            if layer is not None and plain_class(layer) is nn.Linear:
                self.linear(name, (Segment(layer.out_features),), self.width)
            elif not isinstance(layer, nn.Identity | None):
                self.can_narrow = False

    def _block(self, i: int, name: str, block: Any) -> None:
        if isinstance(block, ParallelScalingBlock):
            self._scaling_block(i, name, block)
        elif isinstance(block, ParallelThingsBlock):
            for j, branch in enumerate(block.attns):
                self._attention(i, f"{name}.attns.{j}.attn", f".attns.{j}")
                self._beside(f"{name}.attns.{j}", branch, ("norm", "ls"))
            for j, branch in enumerate(block.ffns):
                self._mlp(i, f"{name}.ffns.{j}.mlp", f".ffns.{j}")
                self._beside(f"{name}.ffns.{j}", branch, ("norm", "ls"))
        else:
            self._attention(i, f"{name}.attn")
            self._mlp(i, f"{name}.mlp")
            self._beside(name, block, ("norm1", "ls1", "norm2", "ls2"))
            if isinstance(block, ResPostBlock):
                self.branch_ends[-2:] = f"{name}.norm1", f"{name}.norm2"

    def _attention(self, i: int, name: str, branch: str = "") -> None:
        attention = self.known(name, (Attention,), "attention")
        if not hasattr(attention, "attn_dim"):
            raise UnsupportedError(
                "Supernet: this timm cannot run attention with fewer heads; install a newer timm."
            )
        group = self._units(i, "heads", branch, attention.num_heads, name, f"{name}.proj")
        heads = Segment(attention.num_heads, attention.head_dim, group)
        self.part(
            name,
            {},
            {
                "num_heads": length((Segment(attention.num_heads, 1, group),)),
                "attn_dim": length((heads,)),
            },
        )
        self.linear(f"{name}.qkv", (heads, heads, heads), self.width)
        if getattr(attention, "gate", None) is not None:
            self.linear(f"{name}.gate", (heads,), self.width)
        self._norm(f"{name}.norm", attention.norm, (heads,))
        self.linear(f"{name}.proj", self.width, (heads,))
        self.branch_ends.append(f"{name}.proj")
        for _ in ("scores", "values"):
            self.operation(name, "pair", (heads,))

    def _mlp(self, i: int, name: str, branch: str = "") -> None:
        mlp = self.known(name, MLPS, "MLP")
        units = mlp.fc2.weight.shape[1]
        group = self._units(i, "mlp", branch, units, name, f"{name}.fc2")
        hidden = Segment(units, 1, group)
        if isinstance(mlp, SwiGLU):
            self.linear(f"{name}.fc1_g", (hidden,), self.width)
            self.linear(f"{name}.fc1_x", (hidden,), self.width)
        else:
            self.linear(f"{name}.fc1", (hidden,) * (2 if isinstance(mlp, GluMlp) else 1), self.width)
        self._norm(f"{name}.norm", mlp.norm, (hidden,))
        self.linear(f"{name}.fc2", self.width, (hidden,))
        self.branch_ends.append(f"{name}.fc2")

    def _scaling_block(self, i: int, name: str, block: Any) -> None:
        self.can_narrow = False
        units, (width,) = block.in_split[0], self.width
        fused = block.out_proj is not None
        group = self._units(
            i, "mlp", "", units, f"{name}.mlp", f"{name}.out_proj" if fused else f"{name}.mlp_out_proj"
        )
        hidden = Segment(units, 1, group)
        rest = block.in_split[1:]
        self.part(
            name,
            {"mlp_bias": ((hidden,),)},
            {"in_split": lambda sizes: [int(hidden.used(sizes)), *rest]},
        )
        self.linear(f"{name}.in_proj", (hidden, width, width, width), self.width)
        if fused:
            self.linear(f"{name}.out_proj", self.width, (width, hidden))
        else:
            self.linear(f"{name}.attn_out_proj", self.width, self.width)
            self.linear(f"{name}.mlp_out_proj", self.width, (hidden,))
        for _ in ("scores", "values"):
            self.operation(name, "pair", self.width)

    def _units(self, i: int, what: str, branch: str, units: int, target: str, way_out: str) -> str:
        targets = (f"blocks.{i}", target, *((target.rpartition(".")[0],) if branch else ()))
        return self.group(f"layers.{i}{branch}.{what}", units, (f"layers.{i}.{what}", what), targets, way_out)

    def _beside(self, name: str, owner: Any, members: tuple[str, ...]) -> None:
        for member in members:
            module = getattr(owner, member, None)
            if type(module) is LayerScale:
                self.part(f"{name}.{member}", {"gamma": (self.width,)})
            elif module is not None:
                self._norm(f"{name}.{member}", module, self.width)

    def _norm(self, name: str, norm: nn.Module, axis: Axis) -> None:
        if isinstance(norm, nn.Identity):
            return
        if type(norm) not in NORMS and axis == self.width:
            self.can_narrow = False
            return
        self.norm(name, axis, NORMS)
