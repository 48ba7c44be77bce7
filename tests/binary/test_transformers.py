"""Attentions of whole networks: what they compute, what of them stays, and the recipes of the papers."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_nas.binary import (
    attention_layers,
    binarize_attention,
    binarize_transformer,
    layers,
    release_attention,
    set_parts,
    softmax_aware,
)
from lightning_nas.errors import NASError, NoMatchError, UnsupportedError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
METHODS = pytest.mark.parametrize("method", ["bivit", "bit", "bipft"])


def timm_vit():
    settings = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 3,
    }
    return timm.create_model("vit_tiny_patch16_224", **settings)


def timm_swin():
    settings = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "num_classes": 3}
    return timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(2, 4), **settings)


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=99, **SMALL))


NETWORKS = {
    "timm ViT": (timm_vit, 2),
    "timm Swin": (timm_swin, 4),
    "BERT": (bert, 2),
    "RoBERTa": (lambda: RobertaModel(RobertaConfig(vocab_size=99, **SMALL)), 2),
    "DistilBERT": (
        lambda: DistilBertModel(
            DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
        ),
        2,
    ),
    "ViT": (lambda: ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SMALL)), 2),
    "Swin": (
        lambda: SwinForImageClassification(
            SwinConfig(
                image_size=32, patch_size=4, window_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4]
            )
        ),
        4,
    ),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    make, count = NETWORKS[request.param]
    model = make().eval()
    if "BERT" in request.param.upper():
        inputs = torch.randint(5, 99, (2, 7))
    else:
        inputs = torch.randn(2, 3, *(32, 32) if "Swin" in request.param else (16, 16))
    return model, inputs, count


def logits(model, inputs):
    output = model(inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


@METHODS
def test_codes_switched_off_leave_what_the_library_computes(network, method):
    model, inputs, count = network
    expected = logits(model, inputs)
    before = {name: id(p) for name, p in model.named_parameters()}
    binarize_attention(model, method)
    assert len(attention_layers(model)) == count
    with_codes = logits(model, inputs)
    for attention in attention_layers(model).values():
        attention.is_on = False
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(with_codes, expected, rtol=1e-5, atol=1e-5)
    after = {n: id(p) for n, p in model.named_parameters() if "binary_attention" not in n}
    assert after == before
    release_attention(model)
    assert torch.equal(logits(model, inputs), expected)
    assert {n: id(p) for n, p in model.named_parameters()} == before


@METHODS
def test_checkpoints_of_the_plain_network_and_of_the_binary_one_both_load(network, method):
    model, inputs, _ = network
    plain = copy.deepcopy(model.state_dict())
    binarize_attention(model, method).train()
    logits(model, inputs).sum().backward()  # starts the scales
    model.eval()
    expected, trained = logits(model, inputs), copy.deepcopy(model.state_dict())
    other = binarize_attention(copy.deepcopy(release_attention(copy.deepcopy(model))), method).eval()
    other.load_state_dict(trained)
    assert torch.equal(logits(other, inputs), expected)
    other.load_state_dict(plain)  # strictly, and what is learned besides stays
    assert torch.equal(logits(other, inputs), expected)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(same, inputs), expected)


def test_an_attention_of_timm_equals_its_formula_written_out():
    torch.manual_seed(0)
    model = binarize_attention(timm_vit().double(), "bivit").eval()
    attention, x = model.blocks[0].attn, torch.randn(2, 5, 32, dtype=torch.float64)
    signs = torch.where(attention.qkv(x) >= 0, 1.0, -1.0).double()
    q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in signs.chunk(3, -1))
    codes = softmax_aware((q @ k.mT / 8**0.5).softmax(-1))
    expected = attention.proj((codes @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)


def test_padding_has_no_part_in_what_a_bert_says_of_the_others():
    torch.manual_seed(0)
    model = binarize_attention(bert(), "bit").eval()
    ids, mask = torch.randint(5, 99, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[:, 4:] = 0
    one = model(ids, attention_mask=mask).logits
    ids[:, 4:] = 3
    assert torch.equal(one, model(ids, attention_mask=mask).logits)
    attentions = model(ids, attention_mask=mask, output_attentions=True).attentions
    assert not attentions[0][..., 4:].any()


@METHODS
def test_the_recipes_of_the_papers_train_every_parameter_that_they_add(network, method):
    model, inputs, count = network
    binarize_transformer(model, method).train()
    assert len(attention_layers(model)) == count
    logits(model, inputs).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in silent if "pooler" not in n and "mask_token" not in n]
    if method != "bivit":
        inputs_of_fc2 = [
            layer
            for name, layer in layers(model).items()
            if name.endswith(("mlp.fc2", "output.dense", "lin2")) and "attention" not in name
        ]
        assert inputs_of_fc2
        assert all(layer.input_is_nonnegative for layer in inputs_of_fc2)  # they follow a ReLU now
    else:
        assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert not [name for name in layers(model) if "binary_attention" in name]


def test_one_bit_weights_alone_leave_attentions_and_activations_real():
    model = binarize_transformer(bert(), "bit", activations=32)
    assert not attention_layers(model)
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert {layer.weights.bits for layer in layers(model).values()} == {1}


def test_the_weights_of_bit_are_signs_about_the_mean_of_the_layer_with_one_scale():
    torch.manual_seed(0)
    model = binarize_transformer(bert(), "bit")
    layer = model.bert.encoder.layer[0].intermediate.dense
    about = (layer.weight - layer.weight.mean()).detach()
    assert torch.equal(layer.binary_weight, torch.where(about >= 0, 1.0, -1.0))
    assert layer.scale.item() == pytest.approx(about.abs().mean().item())
    upstream = torch.randn_like(layer.weight)
    found = torch.autograd.grad(layer.binary_weight, layer.weight, upstream)[0]
    torch.testing.assert_close(found, upstream - upstream.mean())  # the identity, through the mean


def test_parts_are_switched_one_after_the_other():
    torch.manual_seed(0)
    model, inputs = timm_vit().eval(), torch.randn(2, 3, 16, 16)
    plain = logits(model, inputs)
    binarize_transformer(model, "bivit").eval()
    set_parts(model, attention=True, mlp=False)
    on = {name for name, layer in layers(model).items() if layer.weight_bits == 1}
    assert on == {f"blocks.{i}.attn.{name}" for i in range(2) for name in ("qkv", "proj")}
    set_parts(model, attention=False, mlp=True)
    on = {name for name, layer in layers(model).items() if layer.input_bits == 1}
    assert on == {f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("fc1", "fc2")}
    assert not any(attention.is_on for attention in attention_layers(model).values())
    set_parts(model, attention=True, mlp=True)
    assert not torch.allclose(logits(model, inputs), plain)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: binarize_attention(bert(), "bet"),
            ValueError,
            "Unknown binary attention 'bet'. Did you mean 'bit'",
        ),
        (lambda: binarize_attention(nn.Linear(3, 3)), NoMatchError, "no attention in this Linear"),
        (
            lambda: binarize_attention(GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))),
            (NoMatchError, UnsupportedError),
            "no attention|decoder",
        ),
        (
            lambda: binarize_attention(
                LlamaModel(LlamaConfig(vocab_size=9, num_key_value_heads=2, **SMALL)), "bit"
            ),
            UnsupportedError,
            "shares keys among heads",
        ),
        (lambda: binarize_attention(binarize_attention(bert())), NASError, "already"),
        (lambda: binarize_transformer(bert(), "bibert"), ValueError, "must be one of"),
        (lambda: set_parts(bert(), attention=True, mlp=True), NASError, "no binary layer"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_refused_recipe_leaves_the_network_as_it_was():
    class NoAttention(nn.Sequential):
        pass

    model = NoAttention(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(NoMatchError):
        binarize_transformer(model, "bit")
    assert [type(module) for module in model] == [nn.Linear] * 3


@pytest.mark.slow
def test_a_binary_checkpoint_loads_in_a_fresh_process(tmp_path):
    torch.manual_seed(0)
    model = binarize_transformer(timm_vit(), "bipft").train()
    x = torch.randn(2, 3, 16, 16)
    model(x).sum().backward()
    model.eval()
    torch.save({"weights": model.state_dict(), "x": x, "y": model(x).detach()}, tmp_path / "all.pt")
    code = f"""
import torch
from tests.binary.test_transformers import binarize_transformer, timm_vit
saved = torch.load({str(tmp_path / "all.pt")!r})
model = binarize_transformer(timm_vit(), "bipft").eval()
model.load_state_dict(saved["weights"])
assert torch.equal(model(saved["x"]), saved["y"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
