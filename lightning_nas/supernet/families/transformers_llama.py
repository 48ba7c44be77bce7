"""Llama of transformers, and Mistral and Qwen2, which are built like it: what of them is elastic."""

from __future__ import annotations

import copy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer, MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP

from lightning_nas.supernet.adapter import Reader, length
from lightning_nas.supernet.anatomy import Anatomy, Axis, Segment, Sizes
from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._transformers import (
    TransformersAdapter,
    refuse_attention,
    whole_classes,
)

__all__ = ["TransformersLlama"]

BLOCKS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
ATTENTIONS = (LlamaAttention, MistralAttention, Qwen2Attention)
MLPS = (LlamaMLP, MistralMLP, Qwen2MLP)
HEADS = (
    "Model",
    "ForCausalLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


class TransformersLlama(TransformersAdapter):
    """Adapter of Llama, Mistral and Qwen2.

    Elastic: ``"depth"``, ``"layers.{i}.heads"``, ``"layers.{i}.mlp"`` (or ``"heads"`` and ``"mlp"``, one
    value for all blocks). What ``heads`` counts are key-value heads: each goes with all the query heads that
    share it. The first block always runs, and so does the first one of each kind of attention where a network
    mixes full and sliding ones: transformers reads the length of a cache from them. Assisted generation with
    sliding windows needs an extracted network, since transformers cannot shorten the cache of a block that
    does not run.

    A copy's config has its number of blocks, and its heads and hidden units where all blocks have as many and
    the config's class allows them (a Llama's width must be a multiple of its query heads).
    """

    name = "transformers_llama"

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a Llama-like decoder.

        Raises:
            UnsupportedError: for a block, attention, MLP or linear layer of a class not known here.
        """
        refuse_attention(model)
        reader = Reader(model)
        base: Any = model.base_model
        layers = "layers" if base is model else f"{model.base_model_prefix}.layers"
        width: Axis = (Segment(base.config.hidden_size),)
        kinds = getattr(base.config, "layer_types", None) or ["full_attention"] * len(base.layers)
        fixed = tuple(sorted({kinds.index(kind) for kind in kinds}))
        for i, name in enumerate(reader.stage(layers, fixed=fixed)):
            reader.known(name, BLOCKS, "block")
            _attention(reader, i, name, width)
            _mlp(reader, i, name, width)
        return reader.anatomy()

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Correct the config, and number the blocks of a copy anew."""
        super().trim(model, kept, sizes)
        base: Any = model.base_model
        config, attentions = base.config, [layer.self_attn for layer in base.layers]
        for i, attention in enumerate(attentions):  # by its number each finds its part of a cache
            attention.layer_idx = i
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in kept]
        config.num_hidden_layers = len(base.layers)
        units = {layer.mlp.down_proj.in_features for layer in base.layers}
        if len(units) == 1:
            config.intermediate_size = units.pop()
        groups = {_key_value_heads(attention) for attention in attentions}
        if len(groups) == 1 and groups != {config.num_key_value_heads}:
            _record_heads(config, attentions[0])


for _file, _name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2")):
    for _full_name in whole_classes(f"{_file}.modeling_{_file}", *(f"{_name}{head}" for head in HEADS)):
        families.register(_full_name)(TransformersLlama())


def _key_value_heads(attention: Any) -> int:
    return int(attention.k_proj.out_features // attention.head_dim)


def _record_heads(config: Any, attention: Any) -> None:
    """Set the heads of a config to those of an attention, unless its class refuses them."""
    heads = _key_value_heads(attention)
    values = {
        "num_key_value_heads": heads,
        "num_attention_heads": heads * attention.num_key_value_groups,
        "head_dim": attention.head_dim,
    }
    tried = copy.deepcopy(config)
    for name, value in values.items():
        setattr(tried, name, value)
    try:
        tried.validate()
    except StrictDataclassError:
        return
    for name, value in values.items():
        setattr(config, name, value)


def _attention(reader: Reader, i: int, block: str, width: Axis) -> None:
    name = f"{block}.self_attn"
    attention = reader.known(name, ATTENTIONS, "attention")
    units = _key_value_heads(attention)
    group = reader.group(
        f"layers.{i}.heads",
        units,
        choices=(f"layers.{i}.heads", "heads"),
        targets=(block, name),
        way_out=f"{name}.o_proj",
    )
    keys = (Segment(units, attention.head_dim, group),)
    queries = (Segment(units, attention.head_dim * attention.num_key_value_groups, group),)
    reader.linear(f"{name}.q_proj", queries, width)
    reader.linear(f"{name}.k_proj", keys, width)
    reader.linear(f"{name}.v_proj", keys, width)
    reader.linear(f"{name}.o_proj", width, queries)
    for _ in ("scores", "values"):
        reader.operation(name, "pair", queries)


def _mlp(reader: Reader, i: int, block: str, width: Axis) -> None:
    name = f"{block}.mlp"
    units = reader.known(name, MLPS, "MLP").down_proj.in_features
    group = reader.group(
        f"layers.{i}.mlp",
        units,
        choices=(f"layers.{i}.mlp", "mlp"),
        targets=(block, name),
        way_out=f"{name}.down_proj",
    )
    hidden = (Segment(units, group=group),)
    reader.part(name, {}, {"intermediate_size": length(hidden)})
    reader.linear(f"{name}.gate_proj", hidden, width)
    reader.linear(f"{name}.up_proj", hidden, width)
    reader.linear(f"{name}.down_proj", width, hidden)
