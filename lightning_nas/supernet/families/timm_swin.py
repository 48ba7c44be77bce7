"""timm's Swin transformer: attention in windows, in stages of falling resolution."""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import nn

from lightning_nas.supernet.adapter import Adapter, Reader, length
from lightning_nas.supernet.anatomy import Anatomy, Axis, Segment, Sizes
from lightning_nas.supernet.families import families

__all__ = ["TimmSwin"]


class TimmSwin(Adapter):
    """Adapter of timm's Swin transformers (not of version 2).

    Elastic: ``"stages.{s}.depth"``; ``"stages.{s}.layers.{i}.heads"`` and ``"stages.{s}.layers.{i}.mlp"``, or
    ``"stages.{s}.heads"`` and ``"stages.{s}.mlp"`` for all blocks of a stage. The widths of the stages stay
    whole. A block keeps its kind, with shifted windows or without, whichever run beside it.
    """

    name = "timm_swin"

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a Swin transformer.

        Raises:
            UnsupportedError: for a block, attention or MLP of a class not known here.
        """
        return _Swin(model).anatomy()

    def trim(self, model: Any, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Let each stage say how many blocks it has."""
        for stage in model.layers:
            stage.depth = len(stage.blocks)

    def unfuse(self, model: nn.Module) -> None:
        """Attention as two matrix products, which operation counters see."""
        for module in model.modules():
            if isinstance(module, WindowAttention):
                module.fused_attn = False  # type: ignore[misc]  # declared final for scripting


families.register(f"{SwinTransformer.__module__}.{SwinTransformer.__qualname__}")(TimmSwin())


class _Swin(Reader):
    """Reads one Swin transformer, stage by stage."""

    def anatomy(self) -> Anatomy:
        for s in range(len(self.model.layers)):
            for i, block in enumerate(self.stage(f"layers.{s}.blocks", f"stages.{s}.depth")):
                self.known(block, (SwinTransformerBlock,), "block")
                self._attention(s, i, block)
                self._mlp(s, i, block)
        return super().anatomy()

    def _attention(self, s: int, i: int, block: str) -> None:
        name = f"{block}.attn"
        attention = self.known(name, (WindowAttention,), "attention")
        count = attention.num_heads
        group = self._units(s, i, "heads", count, block, name, f"{name}.proj")
        heads: Axis = (Segment(count, attention.proj.in_features // count, group),)
        one: Axis = (Segment(count, 1, group),)
        width: Axis = (Segment(attention.proj.out_features),)
        places: Axis = (Segment(len(attention.relative_position_bias_table)),)
        self.part(name, {"relative_position_bias_table": (places, one)}, {"num_heads": length(one)})
        self.linear(f"{name}.qkv", heads * 3, width)
        self.linear(f"{name}.proj", width, heads)
        for _ in ("scores", "values"):
            self.operation(name, "pair", heads)

    def _mlp(self, s: int, i: int, block: str) -> None:
        name = f"{block}.mlp"
        mlp = self.known(name, (Mlp,), "MLP")
        units = mlp.fc1.out_features
        hidden: Axis = (Segment(units, 1, self._units(s, i, "mlp", units, block, name, f"{name}.fc2")),)
        width: Axis = (Segment(mlp.fc2.out_features),)
        self.linear(f"{name}.fc1", hidden, width)
        self.linear(f"{name}.fc2", width, hidden)

    def _units(self, s: int, i: int, what: str, units: int, block: str, target: str, way_out: str) -> str:
        name = f"stages.{s}.layers.{i}.{what}"
        return self.group(name, units, (name, f"stages.{s}.{what}"), (block, target), way_out)
