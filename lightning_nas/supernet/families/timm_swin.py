"""timm's Swin Transformer: stages of blocks whose attention works inside windows."""

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
    """Adapter of timm's Swin Transformers; of the second version (SwinV2) it is none.

    Elastic: ``"stages.{s}.depth"``, ``"stages.{s}.layers.{i}.heads"`` and ``"stages.{s}.layers.{i}.mlp"`` (or
    ``"stages.{s}.heads"`` and ``"stages.{s}.mlp"``, one value for all blocks of a stage). The width of the
    embedding stays whole.

    Each block keeps the shift of its windows. Plain and shifted ones therefore alternate in a smaller network
    only where the first blocks are kept (``keep="first"``).

    Reference: Liu et al., Swin Transformer, ICCV 2021.
    """

    name = "timm_swin"

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a Swin Transformer.

        Raises:
            UnsupportedError: for a block, attention, MLP or linear layer of a class not known here.
        """
        reader = _Swin(model)
        for s in range(len(reader.model.layers)):
            reader.read_stage(s)
        return reader.anatomy()

    def trim(self, model: Any, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Correct how many blocks each stage says it has."""
        for stage in model.layers:
            stage.depth = len(stage.blocks)

    def unfuse(self, model: nn.Module) -> None:
        """Attention as two matrix products, which operation counters see."""
        for module in model.modules():
            if isinstance(module, WindowAttention):
                module.fused_attn = False


families.register(f"{SwinTransformer.__module__}.{SwinTransformer.__qualname__}")(TimmSwin())


class _Swin(Reader):
    """Reads one Swin Transformer, stage by stage."""

    def read_stage(self, s: int) -> None:
        for i, block in enumerate(self.stage(f"layers.{s}.blocks", f"stages.{s}.depth")):
            self.known(block, (SwinTransformerBlock,), "block")
            self._attention(s, i, block)
            self._mlp(s, i, block)

    def _attention(self, s: int, i: int, block: str) -> None:
        name = f"{block}.attn"
        attention = self.known(name, (WindowAttention,), "attention")
        width: Axis = (Segment(attention.dim),)
        group = self._units(s, i, "heads", attention.num_heads, (block, name), f"{name}.proj")
        one_each = (Segment(attention.num_heads, 1, group),)
        head_dim = attention.proj.in_features // attention.num_heads
        heads = Segment(attention.num_heads, head_dim, group)
        offsets = (Segment(len(attention.relative_position_bias_table)),)
        self.part(
            name, {"relative_position_bias_table": (offsets, one_each)}, {"num_heads": length(one_each)}
        )
        self.linear(f"{name}.qkv", (heads, heads, heads), width)
        self.linear(f"{name}.proj", width, (heads,))
        for _ in ("scores", "values"):
            self.operation(name, "pair", (heads,))

    def _mlp(self, s: int, i: int, block: str) -> None:
        name = f"{block}.mlp"
        mlp = self.known(name, (Mlp,), "MLP")
        out, units = mlp.fc2.weight.shape
        width = (Segment(out),)
        hidden = (Segment(units, 1, self._units(s, i, "mlp", units, (block, name), f"{name}.fc2")),)
        self.linear(f"{name}.fc1", hidden, width)
        self.linear(f"{name}.fc2", width, hidden)

    def _units(self, s: int, i: int, what: str, units: int, targets: tuple[str, ...], way_out: str) -> str:
        name = f"stages.{s}.layers.{i}.{what}"
        return self.group(name, units, (name, f"stages.{s}.{what}"), targets, way_out)
