"""Networks of transformers, cut by hand here, through ``save`` and ``load``."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_nas.errors import SavedFolderError, UnsupportedError
from lightning_nas.saving import load, save

HEAD, WIDTH, VOCABULARY = 8, 32, 50
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2, **SIZES}
IMAGE = {"image_size": 8, "patch_size": 4, **SIZES}
STANDARD = {"model.safetensors", "network.json", "config.json"}


# --- networks, cut by hand


def bert(**settings):
    return BertForSequenceClassification(BertConfig(**{**TEXT, "num_labels": 5, **settings}))


def roberta():
    return RobertaForMaskedLM(RobertaConfig(**TEXT))


def distilbert():
    sizes = {"dim": WIDTH, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 20}
    return DistilBertForQuestionAnswering(DistilBertConfig(vocab_size=VOCABULARY, **sizes))


def vit(**settings):
    return ViTForImageClassification(ViTConfig(**{**IMAGE, **settings}))


def deit():
    return DeiTForImageClassification(DeiTConfig(**IMAGE))


def beit():
    return BeitForImageClassification(BeitConfig(use_relative_position_bias=True, **IMAGE))


def gpt2():
    sizes = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 20}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes))


def llama(**settings):
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_key_value_heads": 2, **settings}))


def clip():
    towers = {"text_config": {**TEXT, "eos_token_id": 49}, "vision_config": IMAGE}
    return CLIPModel(CLIPConfig(projection_dim=16, **towers))


def clip_text():
    return CLIPTextModelWithProjection(CLIPTextConfig(**{**TEXT, "eos_token_id": 49}))


def outputs_of(linear, count):
    """Keep the first outputs of a linear layer."""
    linear.weight = nn.Parameter(linear.weight.data[:count].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[:count].clone())
    linear.out_features = count


def inputs_of(linear, count):
    """Keep the first inputs of a linear layer."""
    linear.weight = nn.Parameter(linear.weight.data[:, :count].clone())
    linear.in_features = count


def cut_projections(projections, heads, out):
    for projection in projections:
        outputs_of(projection, heads * HEAD)
    inputs_of(out, heads * HEAD)


def cut_bert_layer(layer, heads=None, mlp=None):
    attention = layer.attention.self
    if heads:
        cut_projections((attention.query, attention.key, attention.value), heads, layer.attention.output.dense)
        attention.num_attention_heads, attention.all_head_size = heads, heads * HEAD
    if mlp:
        outputs_of(layer.intermediate.dense, mlp)
        inputs_of(layer.output.dense, mlp)


def cut_distilbert_layer(layer, heads=None, mlp=None):
    attention = layer.attention
    if heads:
        cut_projections((attention.q_lin, attention.k_lin, attention.v_lin), heads, attention.out_lin)
        attention.n_heads = heads
    if mlp:
        outputs_of(layer.ffn.lin1, mlp)
        inputs_of(layer.ffn.lin2, mlp)


def cut_vision_layer(layer, heads=None, mlp=None):
    attention = layer.attention
    if heads:
        cut_projections((attention.q_proj, attention.k_proj, attention.v_proj), heads, attention.o_proj)
        attention.num_attention_heads = heads
        if hasattr(layer, "relative_position_bias"):
            bias = layer.relative_position_bias
            bias.relative_position_bias_table = nn.Parameter(bias.relative_position_bias_table.data[:, :heads])
    if mlp:
        outputs_of(layer.mlp.fc1, mlp)
        inputs_of(layer.mlp.fc2, mlp)


def cut_clip_layer(layer, heads=None, mlp=None):
    attention = layer.self_attn
    if heads:
        cut_projections((attention.q_proj, attention.k_proj, attention.v_proj), heads, attention.out_proj)
        attention.num_heads = heads
    if mlp:
        outputs_of(layer.mlp.fc1, mlp)
        inputs_of(layer.mlp.fc2, mlp)


def cut_llama_layer(layer, groups=None, mlp=None):
    """Whole groups of two query heads and their key and value head."""
    attention = layer.self_attn
    if groups:
        heads = groups * attention.num_key_value_groups
        cut_projections((attention.q_proj,), heads, attention.o_proj)
        for projection in (attention.k_proj, attention.v_proj):
            outputs_of(projection, groups * HEAD)
    if mlp:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            outputs_of(projection, mlp)
        inputs_of(layer.mlp.down_proj, mlp)
        layer.mlp.intermediate_size = mlp


def conv1d(layer, kept_in, kept_out):
    """GPT-2's linear layer: its weight is the other way round."""
    layer.weight = nn.Parameter(layer.weight.data[kept_in][:, kept_out].clone())
    layer.bias = nn.Parameter(layer.bias.data[kept_out].clone())
    layer.nx, layer.nf = layer.weight.shape


def cut_gpt2_layer(layer, heads=None, mlp=None):
    attention, whole = layer.attn, torch.arange(WIDTH)
    if heads:
        kept = torch.arange(heads * HEAD)
        conv1d(attention.c_attn, whole, torch.cat([kept, kept + WIDTH, kept + 2 * WIDTH]))
        conv1d(attention.c_proj, kept, whole)
        attention.num_heads, attention.split_size = heads, heads * HEAD
    if mlp:
        conv1d(layer.mlp.c_fc, whole, torch.arange(mlp))
        conv1d(layer.mlp.c_proj, torch.arange(mlp), whole)


CUTS = {
    BertForSequenceClassification: (lambda m: m.bert.encoder.layer, cut_bert_layer),
    RobertaForMaskedLM: (lambda m: m.roberta.encoder.layer, cut_bert_layer),
    DistilBertForQuestionAnswering: (lambda m: m.distilbert.transformer.layer, cut_distilbert_layer),
    ViTForImageClassification: (lambda m: m.vit.layers, cut_vision_layer),
    DeiTForImageClassification: (lambda m: m.deit.layers, cut_vision_layer),
    BeitForImageClassification: (lambda m: m.beit.layers, cut_vision_layer),
    GPT2LMHeadModel: (lambda m: m.transformer.h, cut_gpt2_layer),
    LlamaForCausalLM: (lambda m: m.model.layers, cut_llama_layer),
    CLIPTextModelWithProjection: (lambda m: m.text_model.encoder.layers, cut_clip_layer),
}


def cut(model, *sizes, **settings):
    """The first layers, of the given heads and MLP widths; settings that the config can say are said."""
    layers_of, cut_layer = CUTS[type(model)]
    layers = layers_of(model)
    del layers[len(sizes) :]
    for layer, size in zip(layers, sizes, strict=True):
        cut_layer(layer, *size)
    model.config.num_hidden_layers = len(sizes)
    if hasattr(model.config, "stage_names"):  # BEiT may be a backbone
        model.config.stage_names = model.config.stage_names[: len(sizes) + 1]
        model.config.set_output_features_output_indices(None, None)
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


def cut_clip(model, text, vision):
    for tower, config, sizes in (
        (model.text_model, model.config.text_config, text),
        (model.vision_model, model.config.vision_config, vision),
    ):
        del tower.encoder.layers[len(sizes) :]
        config.num_hidden_layers = len(sizes)
        for layer, size in zip(tower.encoder.layers, sizes, strict=True):
            cut_clip_layer(layer, *size)
    return model


def narrow_bert(width):
    """Fewer units everywhere in the residual stream, heads as they were."""
    model = bert()
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.weight = nn.Parameter(module.weight.data[:width])
            module.bias = nn.Parameter(module.bias.data[:width])
            module.normalized_shape = (width,)
        elif isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(module.weight.data[:, :width])
            module.embedding_dim = width
        elif isinstance(module, nn.Linear):
            if not name.endswith("output.dense"):
                inputs_of(module, width)
            if name.endswith(("output.dense", "pooler.dense")):
                outputs_of(module, width)
    return model


def mixed_types():
    model = cut(bert().to(torch.bfloat16), (2,), (4,))
    model.classifier.float()
    model.classifier.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    return model


def untied_head():
    return RobertaForMaskedLM(RobertaConfig(tie_word_embeddings=False, **TEXT))


NONE = (None, None)
# What a configuration can say.
EXPRESSIBLE = {
    "BERT whole": bert,
    "BERT, fewer layers": lambda: cut(bert(), NONE, NONE),
    "BERT, one smaller MLP width": lambda: cut(bert(), *[(None, 9)] * 3, intermediate_size=9),
    "BERT, eager": lambda: bert(attn_implementation="eager"),
    "BERT, bfloat16": lambda: bert().to(torch.bfloat16),
    "RoBERTa, fewer layers": lambda: cut(roberta(), NONE, NONE),
    "RoBERTa, untied": untied_head,
    "DistilBERT, smaller MLP": lambda: cut(distilbert(), *[(None, 9)] * 2, hidden_dim=9),
    "ViT, fewer heads": lambda: cut(vit(), (2, 20), (2, 20), num_attention_heads=2, head_dim=HEAD, intermediate_size=20),
    "ViT, three of four heads": lambda: cut(vit(), (3,), (3,), num_attention_heads=3, head_dim=HEAD),
    "DeiT, fewer heads": lambda: cut(deit(), (3,), (3,), num_attention_heads=3, head_dim=HEAD),
    "BEiT, fewer heads": lambda: cut(beit(), (3,), (3,), num_attention_heads=3, head_dim=HEAD),
    "GPT-2, fewer layers": lambda: cut(gpt2(), NONE, NONE),
    "GPT-2, smaller MLP": lambda: cut(gpt2(), (None, 9), (None, 9), n_inner=9),
    "Llama, fewer groups": lambda: cut(
        llama(), (1, 20), (1, 20), num_attention_heads=2, num_key_value_heads=1, intermediate_size=20
    ),
    "Llama, tied": lambda: cut(llama(tie_word_embeddings=True), NONE),
    "CLIP, fewer layers": lambda: cut_clip(clip(), [NONE, NONE], [NONE]),
    "CLIP text tower": clip_text,
}
# What it cannot say, and the Auto class that loads it.
OTHERS = {
    "BERT": (lambda: cut(bert(), (1, 7), (4, 48), (2, 20)), "AutoModelForSequenceClassification"),
    "BERT, equal heads, fewer": (lambda: cut(bert(), (2,), (2,)), "AutoModelForSequenceClassification"),
    "BERT, narrow": (lambda: narrow_bert(24), "AutoModelForSequenceClassification"),
    "BERT, half": (lambda: cut(bert(), (2,)).to(torch.float16), "AutoModelForSequenceClassification"),
    "BERT, eager": (
        lambda: cut(bert(attn_implementation="eager"), (2,)),
        "AutoModelForSequenceClassification",
    ),
    "RoBERTa": (lambda: cut(roberta(), (1, 7), (4, 48)), "AutoModelForMaskedLM"),
    "DistilBERT": (lambda: cut(distilbert(), (1, 7), (4, 48)), "AutoModelForQuestionAnswering"),
    "ViT": (lambda: cut(vit(), (1, 7), (4, 48)), "AutoModelForImageClassification"),
    "BEiT": (lambda: cut(beit(), (1, 7), (4, 48)), "AutoModelForImageClassification"),
    "GPT-2": (lambda: cut(gpt2(), (1, 7), (4, 48)), "AutoModelForCausalLM"),
    "Llama by layer": (lambda: cut(llama(), (1, 7), (2, 48)), "AutoModelForCausalLM"),
    "Llama, three of four heads": (
        lambda: cut(llama(num_key_value_heads=4), (3,), (3,)),
        "AutoModelForCausalLM",
    ),
    "CLIP": (lambda: cut_clip(clip(), [(1, 7), (2, 9)], [(3, 8)]), "AutoModel"),
    "a class that no Auto class knows": (lambda: cut(clip_text(), (1, 7), (4, 48)), None),
}
VARIANTS = {f"{n} (standard)": m for n, m in EXPRESSIBLE.items()} | {n: m for n, (m, _) in OTHERS.items()}


def randomised(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():  # ones and zeros would hide a tensor that was not restored
        tensor.data = (torch.randn(tensor.shape, generator=generator) * 0.3).to(tensor.dtype)
    return model.eval()


def inputs_for(model):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY - 1, (2, 6), generator=generator)
    images = torch.randn(2, 3, 8, 8, generator=generator).to(model.dtype)
    if isinstance(model, CLIPModel):
        return {"input_ids": ids, "pixel_values": images}
    return {model.main_input_name: images if model.main_input_name == "pixel_values" else ids}


def outputs(model):
    """Every tensor that the network returns; of a decoder the tokens that it generates too."""
    with torch.no_grad():
        inputs = inputs_for(model)
        found = {k: v for k, v in model(**inputs).items() if isinstance(v, torch.Tensor)}
        if model.can_generate() and not isinstance(model, RobertaForMaskedLM):
            found["tokens"] = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    return found


def assert_same_outputs(model, other):
    found, expected = outputs(model), outputs(other)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every variant: its network, and the folder it was saved in with its inputs and outputs beside."""
    root, result = tmp_path_factory.mktemp("saved"), {}
    for number, (name, make) in enumerate(VARIANTS.items()):
        model = randomised(make(), number)
        folder = save(model, root / f"network{number}")
        data = {f"in.{k}": v for k, v in inputs_for(model).items()}
        data |= {f"out.{k}": v.contiguous() for k, v in outputs(model).items()}
        safetensors.torch.save_file(data, root / f"network{number}.safetensors")
        result[name] = (model, folder)
    return result


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loaded_network_gives_the_saved_ones_outputs_bit_for_bit(saved, name):
    model, folder = saved[name]
    again = load(folder)
    assert type(again) is type(model)
    assert not again.training
    assert_same_outputs(again, model)
