"""Text encoders of transformers that are built as BERT is: attention and MLP, each followed by a norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet.adapter import Preset, Reader, length
from lightning_nas.supernet.anatomy import Anatomy, Axis, Segment, Sizes
from lightning_nas.supernet.families._transformers import TransformersAdapter, refuse_attention

__all__ = ["BASE_PRESETS", "Encoder", "EncoderAdapter"]

BASE = {"depth": 12, "heads": 12, "mlp": 3072}
BASE_PRESETS = {
    "instatune": Preset(
        BASE,
        {
            "depth": tuple(range(6, 13)),
            "heads": (6, 8, 10, 12),
            "mlp": (1024, 2048, 3072),
            "keep": "first",
        },
    ),
}


@dataclass(frozen=True)
class Encoder:
    """Where things are in one architecture of encoder, by the names that its modelling file uses.

    Args:
        layers: container of the blocks, below the base model.
        block: class of a block.
        attention: class of what holds the query, key and value, and their names below a block.
        attributes: attributes there that count heads, and those that count their entries.
        mlp: the two matrices of the MLP, below a block.
        norms: norms below a block.
        embeddings: tables and norm, below the base model.
        config: names in the config: of depth, width, heads and MLP units.
    """

    layers: str
    block: type[nn.Module]
    attention: type[nn.Module]
    attention_name: str
    projections: tuple[str, str, str, str]
    attributes: Mapping[str, str]
    mlp: tuple[str, str]
    norms: tuple[str, str]
    embeddings: tuple[tuple[str, ...], str]
    config: tuple[str, str, str, str] = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
    )


class EncoderAdapter(TransformersAdapter):
    """Adapter of one architecture of encoder.

    Elastic: ``"depth"``, ``"layers.{i}.heads"``, ``"layers.{i}.mlp"`` (or ``"heads"`` and ``"mlp"``, one
    value for all blocks), and ``"embed"``, the width of the residual stream, which goes through embeddings,
    norms and heads; the size of an attention head stays. The head on top stays the user's.

    Args:
        name: of the family.
        encoder: where things are.
        heads: linear layers and norms of the task heads, below the whole model, with the rows that they give:
            ``"width"`` for the width of the residual stream, None for their own.
    """

    presets = BASE_PRESETS

    def __init__(self, name: str, encoder: Encoder, heads: Mapping[str, str | None]) -> None:
        self.name, self.encoder, self.heads = name, encoder, heads

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe an encoder.

        Raises:
            UnsupportedError: for a decoder, a class of layer not known here, or another attention.
        """
        return _Encoder(model, self.encoder, self.heads).anatomy()

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Correct the config, as far as the stock class builds what it says, and number the blocks."""
        super().trim(model, kept, sizes)
        base: Any = getattr(model, getattr(model, "base_model_prefix", ""), model)
        config: Any = model.config
        depth, width, heads, mlp = self.encoder.config
        setattr(config, depth, len(kept))
        container = base.get_submodule(self.encoder.layers)
        if hasattr(owner := base.get_submodule(self.encoder.layers.rpartition(".")[0]), depth):
            setattr(owner, depth, len(kept))
        for i, block in enumerate(container):
            attention = block.get_submodule(self.encoder.attention_name)
            if getattr(attention, "layer_idx", None) is not None:
                attention.layer_idx = i
        if len(widths := {int(sizes[f"layers.{i}.mlp"]) for i in kept}) == 1:
            setattr(config, mlp, widths.pop())
        if (embed := int(sizes["embed"])) != getattr(config, width):
            setattr(config, width, embed)
            if embed % getattr(config, heads):  # or the stock class refuses to be built
                setattr(config, heads, math.gcd(embed, getattr(config, heads)))


class _Encoder(Reader):
    """Reads one encoder."""

    def __init__(self, model: nn.Module, encoder: Encoder, heads: Mapping[str, str | None]) -> None:
        super().__init__(model)
        self.encoder, self.heads = encoder, heads
        prefix = self.model.base_model_prefix
        self.prefix = f"{prefix}." if prefix and hasattr(self.model, prefix) else ""
        self.width: Axis = (Segment(getattr(self.model.config, encoder.config[1]), group="embed"),)

    def anatomy(self) -> Anatomy:
        refuse_attention(self.model)
        config = self.model.config
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            raise UnsupportedError(
                f"Supernet: this {type(self.model).__name__} is used as a decoder (is_decoder or "
                "add_cross_attention in its config), which is not supported; encoders, and decoder families "
                "such as GPT2 and Llama, are."
            )
        for i, name in enumerate(self.stage(f"{self.prefix}{self.encoder.layers}")):
            self._block(i, name)
        can_narrow = self._ends()
        self.group("embed", self.width[0].units, ("embed",) if can_narrow else (), ("embed",))
        return super().anatomy()

    def _block(self, i: int, name: str) -> None:
        encoder = self.encoder
        self.known(name, (encoder.block,), "block")
        at = f"{name}.{encoder.attention_name}"
        attention = self.known(at, (encoder.attention,), "attention")
        *projections, out = (f"{name}.{projection}" for projection in encoder.projections)
        count = next(getattr(attention, a) for a, what in encoder.attributes.items() if what == "heads")
        group = self._units(i, "heads", count, name, at, out)
        heads: Axis = (Segment(count, attention.attention_head_size, group),)
        one: Axis = (Segment(count, 1, group),)
        self.part(at, {}, {a: length(one if w == "heads" else heads) for a, w in encoder.attributes.items()})
        for projection in projections:
            self.linear(projection, heads, self.width)
        self.linear(out, self.width, heads)
        for _ in ("scores", "values"):
            self.operation(at, "pair", heads)
        first, second = (f"{name}.{matrix}" for matrix in encoder.mlp)
        units = self.model.get_submodule(first).out_features
        hidden: Axis = (Segment(units, 1, self._units(i, "mlp", units, name, first, second)),)
        self.linear(first, hidden, self.width)
        self.linear(second, self.width, hidden)
        for norm in encoder.norms:
            self.norm(f"{name}.{norm}", self.width)

    def _units(self, i: int, what: str, units: int, block: str, target: str, way_out: str) -> str:
        name = f"layers.{i}.{what}"
        return self.group(name, units, (name, what), (block, target, target.rpartition(".")[0]), way_out)

    def _ends(self) -> bool:
        """Embeddings and heads; whether all of what reads the residual stream is known."""
        tables, norm = self.encoder.embeddings
        for table in tables:
            self.embedding(f"{self.prefix}{table}", self.width)
        self.norm(f"{self.prefix}{norm}", self.width)
        there = dict(self.model.named_modules())
        for name, rows in self.heads.items():
            layer = there.get(name.replace("{base}", self.prefix))
            full = name.replace("{base}", self.prefix)
            if isinstance(layer, nn.LayerNorm):
                self.norm(full, self.width)
            elif isinstance(layer, nn.Linear):
                own: Axis = (Segment(layer.out_features),)
                self.linear(full, self.width if rows == "width" else own, self.width)
        return not any(self._reads_width(there))

    def _reads_width(self, there: Mapping[str, nn.Module]) -> Iterable[str]:
        """Modules with weights that nothing was said about."""
        return (name for name, m in there.items() if "weight" in m._parameters and name not in self.parts)
