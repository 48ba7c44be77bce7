"""Networks of transformers, cut by hand here, through ``save`` and ``load``."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
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
    CLIPTextModel,
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
    ViltConfig,
    ViltForQuestionAnswering,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_nas.errors import SavedFolderError, UnsupportedError
from lightning_nas.saving import load, save
from tests.saved_folders import MISSING, description_of, forbid_code, rewrite_network

HEAD, WIDTH, VOCABULARY = 8, 32, 50
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 20,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **SIZES,
}
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


def vilt():
    return ViltForQuestionAnswering(ViltConfig(vocab_size=VOCABULARY, **IMAGE))


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
    attention = getattr(layer.attention, "self", None) or layer.attention.attention  # of ViLT
    if heads:
        cut_projections(
            (attention.query, attention.key, attention.value), heads, layer.attention.output.dense
        )
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
            bias.relative_position_bias_table = nn.Parameter(
                bias.relative_position_bias_table.data[:, :heads]
            )
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
    ViltForQuestionAnswering: (lambda m: m.vilt.encoder.layer, cut_bert_layer),
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
    if isinstance(model, DistilBertForQuestionAnswering):
        model.distilbert.transformer.n_layers = len(sizes)
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


def norms_in_single_precision():
    model = cut(bert(), (1, 7), (4, 48)).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
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
    "ViT, fewer heads": lambda: cut(
        vit(), (2, 20), (2, 20), num_attention_heads=2, head_dim=HEAD, intermediate_size=20
    ),
    "ViT, three of four heads": lambda: cut(vit(), (3,), (3,), num_attention_heads=3, head_dim=HEAD),
    "DeiT, fewer heads": lambda: cut(deit(), (3,), (3,), num_attention_heads=3, head_dim=HEAD),
    "BEiT, fewer heads": lambda: cut(beit(), (3,), (3,), num_attention_heads=3, head_dim=HEAD),
    "GPT-2, fewer layers": lambda: cut(gpt2(), NONE, NONE),
    "GPT-2, smaller MLP": lambda: cut(gpt2(), (None, 9), (None, 9), n_inner=9),
    "Llama, fewer groups": lambda: cut(
        llama(), (1, 20), (1, 20), num_attention_heads=2, num_key_value_heads=1, intermediate_size=20
    ),
    "Llama, tied": lambda: cut(llama(tie_word_embeddings=True), NONE),
    "ViLT, fewer layers": lambda: cut(vilt(), NONE, NONE),
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
    "BERT, norms in single precision": (norms_in_single_precision, "AutoModelForSequenceClassification"),
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
    "ViLT": (lambda: cut(vilt(), (1, 7), (4, 48)), "AutoModelForVisualQuestionAnswering"),
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
    if isinstance(model, CLIPModel | ViltForQuestionAnswering):
        return {"input_ids": ids, "pixel_values": images}
    return {model.main_input_name: images if model.main_input_name == "pixel_values" else ids}


def outputs(model):
    """Every tensor that the network returns; of a decoder the tokens that it generates too."""
    with torch.no_grad():
        inputs = inputs_for(model)
        torch.manual_seed(0)  # ViLT draws the order of its patches
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


def test_padding_and_every_hidden_state_are_those_of_the_saved_network(saved):
    model, folder = saved["BERT"]
    inputs = {**inputs_for(model), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    with torch.no_grad():
        expected, found = (m(**inputs, output_hidden_states=True) for m in (model, load(folder)))
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert torch.equal(found.logits, expected.logits)


# --- where this package is missing


@pytest.fixture(scope="module")
def fresh(saved, tmp_path_factory):
    """What a process without this package finds by the line under "rebuild": outputs that differ, by folder.

    And, under "new", the weights that a modelling file gives to a network made from the config alone.
    """
    script = """
import json, os, sys
from pathlib import Path
sys.modules["lightning_nas"] = None
import torch, transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
found = {}
for folder in map(Path, sys.argv[1:]):
    description = json.loads((folder / "network.json").read_text())
    sys.path.insert(0, str(folder))
    names = {"transformers": transformers, "folder": folder}
    exec(description["rebuild"], names)
    sys.path.remove(str(folder))
    sys.modules.pop("modeling_subnetwork", None)
    model, data = names["model"], load_file(folder.with_suffix(".safetensors"))
    inputs = {k[3:]: v for k, v in data.items() if k.startswith("in.")}
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = dict(model(**inputs))
        if "out.tokens" in data:
            outputs["tokens"] = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = {k[4:]: v for k, v in data.items() if k.startswith("out.")}
    found[folder.name] = [k for k, v in expected.items() if not torch.equal(outputs[k], v)]
    if folder.name == os.environ["MADE_NEW"]:
        auto = transformers.AutoModelForSequenceClassification
        new = auto.from_config(model.config, trust_remote_code=True)
        query = new.bert.encoder.layer[0].attention.self.query
        found["new"] = [tuple(query.weight.shape), float(query.weight.std()), float(query.bias.abs().max())]
try:
    import lightning_nas
except ImportError:
    print(json.dumps(found))
"""
    folders = [str(folder) for _, folder in saved.values()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hf"))}
    environment["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
    environment["MADE_NEW"] = saved["BERT"][1].name
    command = [sys.executable, "-c", script, *folders]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def rebuild_of(folder):
    return description_of(folder)["rebuild"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_shape_that_a_config_can_say_is_a_standard_checkpoint_for_plain_from_pretrained(saved, fresh, name):
    model, folder = saved[f"{name} (standard)"]
    assert rebuild_of(folder).startswith(
        f"model = transformers.{type(model).__name__}.from_pretrained(folder"
    )
    assert "trust_remote_code" not in rebuild_of(folder)
    assert {path.name for path in folder.iterdir()} - {"generation_config.json"} == STANDARD
    assert fresh[folder.name] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_any_other_shape_is_rebuilt_by_its_modelling_file_without_this_package(saved, fresh, name):
    _, folder = saved[name]
    auto, rebuild = OTHERS[name][1], rebuild_of(folder)
    assert (
        f"{auto}.from_pretrained(" in rebuild
        if auto
        else rebuild.startswith("from modeling_subnetwork import")
    )
    assert ("trust_remote_code=True" in rebuild) == (auto is not None)
    assert (folder / "modeling_subnetwork.py").exists()
    assert fresh[folder.name] == []


@pytest.mark.parametrize("make", [bert, roberta, distilbert, gpt2, vilt, clip_text])
def test_networks_whose_heads_share_the_width_need_the_modelling_file_for_fewer_heads(tmp_path, make):
    folder = save(cut(make(), *[(2, None)] * 3), tmp_path)
    assert (folder / "modeling_subnetwork.py").exists()


@pytest.mark.parametrize("name", ["BERT", "Llama by layer", "CLIP"])
def test_plain_transformers_refuses_a_folder_whose_modelling_file_it_may_not_run(saved, name):
    model, folder = saved[name]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(folder)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        getattr(transformers, OTHERS[name][1]).from_pretrained(folder)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_standard_checkpoint_holds_what_save_pretrained_writes(saved, tmp_path, name):
    model, folder = saved[f"{name} (standard)"]
    model.save_pretrained(tmp_path)
    for theirs in tmp_path.iterdir():
        assert (folder / theirs.name).read_bytes() == theirs.read_bytes(), theirs.name


@pytest.mark.parametrize("name", ["BERT", "CLIP", "a class that no Auto class knows"])
def test_a_modelling_file_is_formatted_and_names_only_what_it_uses(saved, name):
    file = saved[name][1] / "modeling_subnetwork.py"
    for check in (["format", "--isolated", "--check"], ["check", "--isolated", "--select=E4,E7,E9,F,I"]):
        subprocess.run([sys.executable, "-m", "ruff", *check, str(file)], check=True, capture_output=True)


@pytest.mark.slow
def test_a_modelling_file_gives_new_networks_initialised_weights_of_the_small_shapes(fresh):
    shape, deviation, bias = fresh["new"]
    assert shape == [HEAD, WIDTH]
    assert deviation == pytest.approx(0.02, rel=0.2)  # BERT's rule; four standard errors of 256 weights
    assert bias == 0


# --- what is restored


@pytest.mark.parametrize("name", ["RoBERTa", "GPT-2", "CLIP", "ViT, fewer heads (standard)"])
def test_saving_a_loaded_network_writes_the_same_bytes(saved, tmp_path, name):
    folder = saved[name][1]
    again = save(load(folder), tmp_path / "again")
    assert {path.name for path in again.iterdir()} == {p.name for p in folder.iterdir() if p.is_file()}
    for file in again.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


def test_tied_weights_are_tied_again(saved):
    model = load(saved["GPT-2"][1])
    assert model.lm_head.weight is model.transformer.wte.weight
    model = load(saved["RoBERTa"][1])
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    assert model.lm_head.decoder.bias is model.lm_head.bias
    model = load(saved["RoBERTa, untied (standard)"][1])
    assert model.lm_head.decoder.weight is not model.roberta.embeddings.word_embeddings.weight


@pytest.mark.parametrize("name", ["BERT", "Llama by layer", "CLIP"])
def test_buffers_that_no_file_holds_have_their_values_after_loading(saved, name):
    model, folder = saved[name]
    again = load(folder)
    outside = {n: b for n, b in model.named_buffers() if n not in model.state_dict()}
    assert outside
    assert [n for n, b in outside.items() if not torch.equal(again.get_buffer(n), b)] == []


def test_each_tensor_keeps_its_type(saved):
    model, folder = saved["BERT, norms in single precision"]
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert {name: tensor.dtype for name, tensor in load(folder).state_dict().items()} == dtypes


def test_a_rotary_buffer_cast_with_the_network_is_cast_again(tmp_path):
    model = randomised(cut(llama(), (1, 7)).to(torch.bfloat16), 0)
    assert_same_outputs(load(save(model, tmp_path)), model)


def test_drop_rates_are_restored_though_a_standard_checkpoint_has_those_of_its_config(tmp_path):
    model = cut(beit(), NONE, NONE)  # of three layers with rates from 0 to 0.1
    again = load(save(model, tmp_path))
    assert again.beit.layers[1].drop_path.drop_prob == pytest.approx(0.05)
    assert "trust_remote_code" not in rebuild_of(tmp_path)


def test_generation_settings_are_kept(tmp_path):
    model = cut(gpt2(), (1, 7))
    model.generation_config.max_length = 17
    model.generation_config.eos_token_id = 3
    again = load(save(model, tmp_path))
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_length"] == 17


def test_saving_and_loading_leave_the_network_and_random_numbers_alone(tmp_path):
    model = cut(vit(), (1, 7))
    config, generator = model.config.to_dict(), torch.get_rng_state()
    load(save(model, tmp_path))
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), generator)


def test_how_a_network_is_trained_does_not_change_what_is_written(tmp_path):
    model = bert()
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    model.bert.embeddings.requires_grad_(False)
    assert "trust_remote_code" not in rebuild_of(save(model.train(), tmp_path))


def test_a_network_that_from_pretrained_returned_is_saved_as_a_standard_checkpoint_again(saved, tmp_path):
    for name in ("ViT, fewer heads", "CLIP, fewer layers", "Llama, tied"):
        model, folder = saved[f"{name} (standard)"]
        again = type(model).from_pretrained(folder)
        assert "trust_remote_code" not in rebuild_of(save(again, tmp_path))
        assert_same_outputs(load(tmp_path), model)


def test_one_tower_of_a_checkpoint_of_two_is_saved_under_its_own_names(saved, tmp_path):
    text = CLIPTextModel.from_pretrained(saved["CLIP, fewer layers (standard)"][1])
    folder = save(text, tmp_path)
    assert_same_outputs(load(folder), text)
    assert_same_outputs(CLIPTextModel.from_pretrained(folder), text)


def test_files_of_an_earlier_network_do_not_stay(tmp_path):
    save(cut(gpt2(), (1, 7)), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save(bert(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*STANDARD, "notes.txt"}


# --- what is refused, before anything is written


def with_change(model, change):
    change(model)
    return model


def set_config(model, **settings):
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


def parameter(*shape):
    return nn.Parameter(torch.ones(shape))


REFUSED = {
    "network inside": (lambda: nn.ModuleDict({"net": bert()}), "sub-module 'net' is one"),
    "no network": (
        lambda: bert().bert.encoder,
        "BertEncoder cannot be saved; .*every network of transformers",
    ),
    "layers that the config does not know of": (
        lambda: with_change(bert(), lambda m: m.bert.encoder.layer.__delitem__(2)),
        r"'bert.encoder.layer.2' is absent, but .* a BertLayer.*number of layers",
    ),
    "other layer": (
        lambda: with_change(bert(), lambda m: setattr(m, "classifier", nn.Bilinear(4, 8, 5))),
        "'classifier' is a Bilinear, but .* makes it a Linear",
    ),
    "new parameter": (
        lambda: with_change(bert(), lambda m: m.bert.register_parameter("extra", parameter(2))),
        r"'bert.extra' has the shape \(2,\), .* makes it None",
    ),
    "larger tensor": (
        lambda: with_change(bert(), lambda m: setattr(m.classifier, "weight", parameter(6, WIDTH))),
        r"'classifier.weight' has the shape \(6, 32\), .* makes it \(5, 32\)",
    ),
    "own forward": (
        lambda: with_change(bert(), lambda m: setattr(m, "forward", lambda x: x)),
        "attribute 'forward' .function. is not what",
    ),
    "own activation": (
        lambda: with_change(bert(), lambda m: setattr(m.bert.encoder.layer[0].intermediate, "note", [1])),
        "attribute 'bert.encoder.layer.0.intermediate.note' .list.",
    ),
    "buffer with other values": (
        lambda: with_change(llama(), lambda m: m.model.rotary_emb.inv_freq.mul_(2)),
        "buffer 'model.rotary_emb.inv_freq' is not persistent",
    ),
    "untied against its config": (
        lambda: with_change(gpt2(), lambda m: setattr(m.lm_head, "weight", parameter(VOCABULARY, WIDTH))),
        "'lm_head.weight' and 'transformer.wte.weight' are two tensors, but .* makes them one",
    ),
    "tied against its config": (
        lambda: with_change(
            untied_head(),
            lambda m: setattr(m.lm_head.decoder, "weight", m.roberta.embeddings.word_embeddings.weight),
        ),
        "'lm_head.decoder.weight' .* are one tensor, but .* makes them two",
    ),
    "config that transformers refuses": (
        lambda: set_config(cut(llama(), (1,)), num_attention_heads=3),
        "(?s)cannot build a LlamaForCausalLM from the config .*not a multiple of the number of attention",
    ),
    "no values": (lambda: bert().to("meta"), "holds no values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rebuilt_is_refused_before_anything_is_written(tmp_path, name):
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        save(make(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_users_subclass_is_refused_because_it_may_compute_anything(tmp_path):
    class Mine(BertForSequenceClassification):
        pass

    with pytest.raises(UnsupportedError, match="Mine cannot be saved; supported are"):
        save(Mine(BertConfig(**TEXT)), tmp_path)


# --- damaged folders


UNTOUCHED = {"shapes": {}, "dtypes": {}, "attributes": {}, "absent": []}
DAMAGES = {
    "a class of another package": (
        lambda f: rewrite_network(f, **{"class": "subprocess.Popen"}),
        "'subprocess.Popen' is not a network that transformers exports",
    ),
    "an unknown class": (
        lambda f: rewrite_network(f, **{"class": "transformers.Nothing"}),
        "transformers.Nothing' is not",
    ),
    "no network class": (
        lambda f: rewrite_network(f, **{"class": "transformers.pipeline"}),
        "transformers.pipeline' is not",
    ),
    "no config": (lambda f: rewrite_network(f, config=MISSING), "cannot be built .KeyError: 'config'"),
    "no list of differences": (lambda f: rewrite_network(f, subnetwork=MISSING), "KeyError: 'subnetwork'"),
    "half of that list": (
        lambda f: rewrite_network(f, subnetwork={"shapes": {}}),
        "missing .* 'dtypes', 'attributes', and 'absent'",
    ),
    "a list of nothing": (
        lambda f: rewrite_network(f, subnetwork=UNTOUCHED),
        r"is \(8, 32\), expected \(32, 32\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_says_what_is_wrong(tmp_path, name):
    damage, message = DAMAGES[name]
    folder = save(cut(bert(), (1, 7), (4, 48)), tmp_path / "folder")
    damage(folder)
    with pytest.raises(SavedFolderError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_loading_runs_no_code_of_the_folder_and_unpickles_nothing(tmp_path, monkeypatch):
    model = cut(bert(), (1, 7), (4, 48))
    folder = save(model, tmp_path)
    forbid_code(folder, monkeypatch)
    assert type(load(folder)) is type(model)


def test_a_network_without_an_optional_part_comes_back_without_it(tmp_path):
    model = BertModel(BertConfig(**TEXT), add_pooling_layer=False).eval()
    tokens = torch.arange(1, 9).view(2, 4)
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert loaded.pooler is None
    assert torch.equal(loaded(tokens).last_hidden_state, model(tokens).last_hidden_state)
    assert {name for name, _ in loaded.named_modules()} == {name for name, _ in model.named_modules()}
    pulled_out = BertModel(BertConfig(**TEXT))
    del pulled_out.pooler
    with pytest.raises(
        UnsupportedError, match=r"'pooler' is absent, but the config .* makes it a BertPooler"
    ):
        save(pulled_out, tmp_path / "other")
