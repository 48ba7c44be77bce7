"""Text encoders of transformers that are built as BERT is: attention and MLP, each followed by a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet.adapter import Preset, Reader, length
from lightning_nas.supernet.anatomy import Anatomy, Axis, Segment, Sizes
from lightning_nas.supernet.families._transformers import TransformersAdapter, refuse_attention
from lightning_nas.supernet.layers import plain_class, tensor_of

__all__ = ["Encoder", "EncoderAdapter"]


@dataclass(frozen=True)
class Encoder:
    """Where things are in one architecture of encoder, by the names that its modelling file uses.

    Args:
        block: class of a block.
        attention: class of what holds query, key and value.
        layers: container of the blocks, below the base model.
        attention_name: the attention, below a block.
        heads: its attribute that counts heads.
        projections: query, key, value and output, below a block.
        mlp: the two matrices of the MLP, below a block.
        norms: norms below a block.
        tables: embeddings below the base model.
        inner: linear layers and norms outside of the blocks that give the width of the residual stream, below
            the base model or the whole one; those that a model does not have are passed over.
        last: the same of linear layers that give something else: classes, words.
        units: name in the config of the MLP's units.
    """

    block: type[nn.Module]
    attention: type[nn.Module]
    layers: str
    attention_name: str
    heads: str
    projections: tuple[str, str, str, str]
    mlp: tuple[str, str]
    norms: tuple[str, str]
    tables: tuple[str, ...]
    inner: tuple[str, ...]
    last: tuple[str, ...]
    units: str = "intermediate_size"


def _autodistil(
    depth: tuple[int, ...], heads: tuple[int, ...], embed: tuple[int, ...], ratio: float
) -> Preset:
    """A sub-space of Xu et al., AutoDistil, NeurIPS 2022, table 1: all blocks alike, 256 architectures."""
    return Preset(
        {"depth": 12, "heads": 12, "embed": 768, "mlp": 3072},
        {
            "depth": depth,
            "heads": heads,
            "embed": embed,
            "mlp_ratio": tuple(ratio + step / 2 for step in range(4)),
            "shared": True,
            "keep": {d: [i * 12 // d for i in range(d)] for d in depth},
        },
    )


class EncoderAdapter(TransformersAdapter):
    """Adapter of one architecture of encoder.

    Elastic: ``"depth"``, ``"layers.{i}.heads"``, ``"layers.{i}.mlp"`` (or ``"heads"`` and ``"mlp"``, one
    value for all blocks), and ``"embed"``, the width of the residual stream, which goes through embeddings,
    norms and the layers of the task head; the size of an attention head stays. A head of the user's own stays
    whole, and ``"embed"`` with it. In place of ``"mlp"``, ``"layers.{i}.mlp_ratio"`` or ``"mlp_ratio"``: its
    units for each entry of the width.

    An extracted network's config says how many blocks it has, and its MLP units where all blocks have as
    many. Its width and heads it says only where the heads make up the width: a stock class builds no others.

    Args:
        name: of the family.
        encoder: where things are.
    """

    presets = {  # noqa: RUF012
        "instatune": Preset(
            {"depth": 12, "heads": 12, "mlp": 3072},
            {
                "depth": tuple(range(6, 13)),
                "heads": (6, 8, 10, 12),
                "mlp": (1024, 2048, 3072),
                "keep": "first",
            },
        ),
        "autodistil-base": _autodistil((9, 10, 11, 12), (9, 10, 11, 12), (544, 576, 608, 640), 2.5),
        "autodistil-small": _autodistil((9, 10, 11, 12), (7, 8, 9, 10), (256, 288, 320, 352), 2.5),
        "autodistil-tiny": _autodistil((4, 5, 6, 7), (7, 8, 9, 10), (128, 160, 192, 224), 2.0),
    }

    def __init__(self, name: str, encoder: Encoder) -> None:
        self.name, self.encoder = name, encoder

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe an encoder.

        Raises:
            UnsupportedError: for a decoder, a class of layer not known here, or another attention.
        """
        return _Reader(model, self.encoder).anatomy()

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Correct the config, as far as the stock class builds what it says, and number the blocks."""
        super().trim(model, kept, sizes)
        base: Any = model.base_model
        config: Any = model.config
        config.num_hidden_layers = len(kept)
        above = base.get_submodule(self.encoder.layers.rpartition(".")[0])
        if hasattr(above, "n_layers"):
            above.n_layers = len(kept)
        attentions = [
            block.get_submodule(self.encoder.attention_name)
            for block in base.get_submodule(self.encoder.layers)
        ]
        for i, attention in enumerate(attentions):
            if hasattr(attention, "layer_idx"):
                attention.layer_idx = i
        heads, units = ({int(sizes[f"layers.{i}.{kind}"]) for i in kept} for kind in ("heads", "mlp"))
        if len(units) == 1:
            setattr(config, self.encoder.units, *units)
        if {count * attentions[0].attention_head_size for count in heads} == {int(sizes["embed"])}:
            config.hidden_size, config.num_attention_heads = int(sizes["embed"]), *heads


class _Reader(Reader):
    """Reads one encoder."""

    def __init__(self, model: nn.Module, encoder: Encoder) -> None:
        super().__init__(model)
        self.encoder = encoder
        self.prefix = "" if self.model.base_model is model else f"{self.model.base_model_prefix}."
        # From the layers: a subnetwork's config need not say its width.
        width = self.model.get_submodule(f"{self.prefix}{encoder.tables[0]}").embedding_dim
        self.width: Axis = (Segment(width, group="embed"),)

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
        for table in self.encoder.tables:
            self.embedding(f"{self.prefix}{table}", self.width)
        self._ends(self.encoder.inner, self.width)
        self._ends(self.encoder.last)
        narrows = ("embed",) if self._is_described() else ()
        self.group("embed", self.width[0].units, narrows, ("embed",))
        return super().anatomy()

    def _block(self, i: int, block: str) -> None:
        encoder, at = self.encoder, f"{block}.{self.encoder.attention_name}"
        self.known(block, (encoder.block,), "block")
        attention = self.known(at, (encoder.attention,), "attention")
        *inputs, out = (f"{block}.{projection}" for projection in encoder.projections)
        count = getattr(attention, encoder.heads)
        group = self._units(i, "heads", count, block, at, out)
        heads: Axis = (Segment(count, attention.attention_head_size, group),)
        follow = {encoder.heads: (Segment(count, 1, group),), "all_head_size": heads, "dim": self.width}
        self.part(at, {}, {name: length(axis) for name, axis in follow.items() if self.has(at, name)})
        for projection in inputs:
            self.linear(projection, heads, self.width)
        self.linear(out, self.width, heads)
        for _ in ("scores", "values"):
            self.operation(at, "pair", heads)
        first, second = (f"{block}.{matrix}" for matrix in encoder.mlp)
        units = self.model.get_submodule(first).out_features
        hidden: Axis = (Segment(units, 1, self._units(i, "mlp", units, block, first, second)),)
        self.linear(first, hidden, self.width)
        self.linear(second, self.width, hidden)
        for norm in encoder.norms:
            self.norm(f"{block}.{norm}", self.width)

    def _units(self, i: int, what: str, units: int, block: str, target: str, way_out: str) -> str:
        name, targets = f"layers.{i}.{what}", (block, target, target.rpartition(".")[0])
        ratios = (f"{name}_ratio", f"{what}_ratio") if what == "mlp" else ()
        return self.group(name, units, (name, what), targets, way_out, ratios=ratios, of="embed")

    def _ends(self, names: tuple[str, ...], rows: Axis | None = None) -> None:
        """Layers outside of the blocks; what the user put in their place is left alone."""
        there = dict(self.model.named_modules())
        for name in dict.fromkeys(f"{prefix}{name}" for name in names for prefix in (self.prefix, "")):
            layer = there.get(name)
            if type(layer) is nn.LayerNorm:
                self.norm(name, self.width)
            elif (
                layer is not None
                and plain_class(layer) is nn.Linear
                and layer.in_features == self.width[0].units
            ):
                self.linear(name, rows or (Segment(layer.out_features),), self.width)
            elif isinstance(layer, nn.Tanh):  # of the pooler, whose output may leave the network
                self.part(name, {}, inputs=self.width)
            elif isinstance(bias := getattr(layer, "bias", None), nn.Parameter):
                # Of words, beside a decoder that may have its own.
                self.part(name, {"bias": ((Segment(len(bias)),),)})

    def _is_described(self) -> bool:
        """Whether nothing was left alone."""
        parts = self.parts.values()
        described = {
            id(tensor_of(self.model.get_submodule(part.module), name)) for part in parts for name in part.axes
        }
        return all(id(parameter) in described for parameter in self.model.parameters())
