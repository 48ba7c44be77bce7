"""GPT-2 of transformers: what of it is elastic."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D

from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet.adapter import Reader, length
from lightning_nas.supernet.anatomy import Anatomy, Axis, Segment, Sizes
from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._transformers import (
    TransformersAdapter,
    refuse_attention,
    whole_classes,
)

__all__ = ["TransformersGPT2"]


class TransformersGPT2(TransformersAdapter):
    """Adapter of GPT-2, with its heads.

    Elastic: ``"depth"``, ``"layers.{i}.heads"``, ``"layers.{i}.mlp"`` (or ``"heads"`` and ``"mlp"``, one
    value for all blocks). The first block always runs: transformers reads the length of a cache from it. With
    ``scale_attn_by_inverse_layer_idx`` all do, since a block's number is part of what it computes.

    A copy's config has its number of blocks, and its hidden units where all blocks have as many. Fewer heads
    it cannot express: they would be wider.
    """

    name = "transformers_gpt2"

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a GPT-2.

        Raises:
            UnsupportedError: for cross-attention, or a block or layer of a class not known here.
        """
        refuse_attention(model)
        config: Any = model.config
        if config.add_cross_attention:
            raise UnsupportedError(
                "Supernet: GPT-2 with add_cross_attention=True is not supported, only the decoder alone."
            )
        reader = Reader(model)
        base: Any = model.base_model
        width: Axis = (Segment(config.n_embd),)
        container = "h" if base is model else f"{model.base_model_prefix}.h"
        blocks = [f"{container}.{i}" for i in range(len(base.h))]
        if not config.scale_attn_by_inverse_layer_idx:
            reader.stage(container, fixed=(0,))
        for i, block in enumerate(blocks):
            reader.known(block, (GPT2Block,), "block")
            _attention(reader, i, block, width)
            _mlp(reader, i, block, width)
        return reader.anatomy()

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Correct the config, and number the blocks of a copy anew."""
        super().trim(model, kept, sizes)
        base: Any = model.base_model
        for i, block in enumerate(base.h):  # by its number each attention finds its part of a cache
            block.attn.layer_idx = i
        base.config.n_layer = len(base.h)
        units = {block.mlp.c_fc.nf for block in base.h}
        if len(units) == 1 and units != {base.config.n_inner or 4 * base.config.n_embd}:
            base.config.n_inner = units.pop()


for _name in whole_classes(
    "gpt2.modeling_gpt2",
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
):
    families.register(_name)(TransformersGPT2())


def _attention(reader: Reader, i: int, block: str, width: Axis) -> None:
    name = f"{block}.attn"
    attention = reader.known(name, (GPT2Attention,), "attention")
    group = _group(reader, i, "heads", attention.num_heads, name, f"{name}.c_proj")
    heads = Segment(attention.num_heads, attention.head_dim, group)
    reader.part(
        name,
        {},
        {
            "num_heads": length((Segment(attention.num_heads, group=group),)),
            "split_size": length((heads,)),
        },
    )
    _conv1d(reader, f"{name}.c_attn", width, (heads, heads, heads))
    _conv1d(reader, f"{name}.c_proj", (heads,), width)
    for _ in ("scores", "values"):
        reader.operation(name, "pair", (heads,))


def _mlp(reader: Reader, i: int, block: str, width: Axis) -> None:
    name = f"{block}.mlp"
    units = reader.known(name, (GPT2MLP,), "MLP").c_fc.nf
    hidden = (Segment(units, group=_group(reader, i, "mlp", units, name, f"{name}.c_proj")),)
    _conv1d(reader, f"{name}.c_fc", width, hidden)
    _conv1d(reader, f"{name}.c_proj", hidden, width)


def _group(reader: Reader, i: int, what: str, units: int, module: str, way_out: str) -> str:
    block = module.rpartition(".")[0]
    return reader.group(f"layers.{i}.{what}", units, (f"layers.{i}.{what}", what), (block, module), way_out)


def _conv1d(reader: Reader, name: str, inputs: Axis, outputs: Axis) -> None:
    """A linear layer whose weight is (inputs, outputs)."""
    reader.known(name, (Conv1D,), "linear layer")
    reader.part(
        name,
        {"weight": (inputs, outputs), "bias": (outputs,)},
        {"nx": length(inputs), "nf": length(outputs)},
        inputs=inputs,
    )
    reader.operation(name, "position", inputs, outputs)
