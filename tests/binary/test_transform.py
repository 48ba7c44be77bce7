import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import lightning_nas as nas
from lightning_nas.binary import Activations, BinaryConv2d, BinaryLinear, Weights
from tests.user_modules import tiny_vit

ROOT = Path(__file__).parents[2]


class UserNet(nn.Module):
    """As users write them: functions between layers, one layer registered before it is called."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.unused = nn.Linear(4, 4)
        self.table = nn.Embedding(5, 4, max_norm=1.0)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.depthwise(self.conv(x))
        x = self.shortcut(x) + self.down(nn.functional.gelu(x))
        return self.head(x.mean((2, 3)))


def tiny_bert(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=30, num_labels=3, **changes))


def identities(model):
    return {name: id(parameter) for name, parameter in model.named_parameters()}


# --- which layers


def test_of_a_vision_transformer_the_patch_embedding_and_the_head_stay_real():
    chosen = nas.binary.plan(tiny_vit(depth=1))
    assert chosen.binary == tuple(f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
    assert chosen.real == {"patch_embed.proj": "first layer", "head": "last layer"}
    assert "patch_embed.proj (first layer)" in str(chosen)


def test_of_a_bert_the_embeddings_and_the_classifier_stay_real():
    chosen = nas.binary.plan(tiny_bert())
    assert set(chosen.real) == {
        "bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings", "classifier",
    }  # fmt: skip
    assert len(chosen.binary) == 2 * 6 + 1  # the pooler is one of them


def test_of_a_resnet_the_shortcuts_stay_real():
    chosen = nas.binary.plan(timm.create_model("resnet10t", num_classes=2))
    assert chosen.real["conv1.0"] == "first layer"
    assert chosen.real["fc"] == "last layer"
    assert chosen.real["layer2.0.downsample.1"] == "1 x 1 convolution of a shortcut"
    assert {"layer1.0.conv1", "layer4.0.conv2"} <= set(chosen.binary)


def test_both_heads_of_a_distilled_transformer_stay_real():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=2)
    assert nas.binary.plan(model).real["head"] == nas.binary.plan(model).real["head_dist"] == "last layer"


def test_an_example_tells_which_layers_run_first_and_last_and_which_never():
    chosen = nas.binary.plan(UserNet(), example_inputs=torch.randn(2, 1, 8, 8))
    assert chosen.binary == ("conv", "down")
    assert chosen.real["stem"] == "first layer"
    assert chosen.real["head"] == "last layer"
    assert chosen.real["depthwise"] == "depthwise convolution"
    assert chosen.real["shortcut"] == "1 x 1 convolution of a shortcut"
    assert chosen.real["unused"].startswith("not called")
    assert chosen.real["table"].startswith("an embedding with max_norm")


def test_include_asks_for_layers_that_stay_real_by_default_and_exclude_has_the_last_word():
    model = UserNet()
    chosen = nas.binary.plan(model, include=("stem", "d*"), exclude="down")
    assert chosen.binary == ("stem", "depthwise")
    assert chosen.real["down"] == "excluded"
    assert chosen.real["conv"] == "not included"
    bert = tiny_bert()
    assert nas.binary.plan(bert, include="layer.1.*.query").binary == (
        "bert.encoder.layer.1.attention.self.query",
    )
    nas.binarize(bert, include="word_embeddings", activations=1)
    assert bert.bert.embeddings.word_embeddings.binary_weight.unique().tolist() == [-1, 1]


# --- what inputs become


def test_inputs_behind_a_relu_get_codes_of_0_and_1_and_behind_a_gelu_signs():
    model = UserNet().train()
    running = model.norm.running_mean.clone()
    nas.binarize(model, activations=1, example_inputs=torch.randn(4, 1, 8, 8))
    assert {n: layer.input_is_nonnegative for n, layer in nas.binary.layers(model).items()} == {
        "conv": True, "down": False,
    }  # fmt: skip
    assert model.training
    assert torch.equal(model.norm.running_mean, running)
    report = nas.binary.report(model).splitlines()
    assert report[0] == "conv  weights -1, +1; inputs 0, 1 (never negative in the first batch)"
    assert report[1] == "down  weights -1, +1; inputs -1, +1"


def test_without_an_example_the_first_pass_decides():
    model = nas.binarize(UserNet(), include="conv", activations=1)
    assert nas.binary.report(model).startswith("conv  weights -1, +1; inputs not seen yet")
    model(torch.randn(4, 1, 8, 8))
    assert model.conv.input_is_nonnegative


@pytest.mark.ddp
def test_two_processes_agree_on_codes_and_scale(tmp_path):
    def run(rank):
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2
        )
        layer = BinaryLinear(4, 2, activations=1)
        layer(torch.full((1, 4), [1.0, -4.0][rank]))
        torch.save((layer.input_is_nonnegative, layer.input_scale.item()), tmp_path / f"{rank}.pt")

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [(False, 2.5)] * 2


# --- the swap


@pytest.mark.parametrize("form", [1, "ternary", Weights(scale="learned")])
def test_parameters_keep_name_identity_and_hooks(form):
    model = tiny_vit()
    calls = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    before, plain = identities(model), set(model.state_dict())
    assert nas.binarize(model, weights=form) is model
    assert before.items() <= identities(model).items()
    added = set(model.state_dict()) - plain
    assert added == (
        {f"{n}.weight_scale" for n in nas.binary.layers(model)} if isinstance(form, Weights) else set()
    )
    model(torch.randn(2, 1, 8, 8))
    assert calls == [1]


def test_release_gives_the_plain_network_back_with_its_weights():
    model, images = tiny_vit().eval(), torch.randn(2, 1, 8, 8)
    before, output = identities(model), model(images)
    nas.binarize(model, activations=Activations(has_threshold=True), weights=Weights(scale="learned"))
    assert not torch.equal(model(images), output)
    assert nas.binary.release(model) is model
    assert identities(model) == before
    assert torch.equal(model(images), output)
    assert type(model.blocks[0].mlp.fc1) is nn.Linear
    assert vars(model.blocks[0].mlp.fc1).keys() == vars(nn.Linear(1, 1)).keys()


@pytest.mark.slow
def test_float_and_binary_checkpoints_load_strictly_in_a_fresh_process(tmp_path):
    make = "tiny_vit(seed=5), weights=Weights(scale='learned'), activations=1"
    plain, images = tiny_vit(seed=1), torch.randn(4, 1, 8, 8)
    torch.save({"plain": plain.state_dict()}, tmp_path / "plain.pt")
    binary = nas.binarize(plain, weights=Weights(scale="learned"), activations=1).eval()
    fresh = binary(images).detach()
    for layer in nas.binary.layers(binary).values():
        layer.weight_scale.data *= 1.5
        layer.input_scale.data *= 0.7
    expected = {"fresh": fresh, "trained": binary(images).detach(), "images": images}
    torch.save({**expected, "binary": binary.state_dict()}, tmp_path / "binary.pt")
    code = f"""
import torch, lightning_nas as nas
from lightning_nas.binary import Weights
from tests.user_modules import tiny_vit
torch.set_num_threads(1)
saved = torch.load("binary.pt")
model = nas.binarize({make}).eval()
model(torch.rand(4, 1, 8, 8))  # scales of another batch must not stay
model.load_state_dict(torch.load("plain.pt")["plain"])
assert torch.equal(model(saved["images"]), saved["fresh"])
model = nas.binarize({make}).eval()
model.load_state_dict(saved["binary"])
assert torch.equal(model(saved["images"]), saved["trained"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_with_half_of_what_a_layer_learned_is_refused():
    model = nas.binarize(tiny_vit(), activations=1)
    damaged = model.state_dict()
    del damaged["blocks.0.attn.qkv.input_scale"]
    with pytest.raises(RuntimeError, match="Missing key.*blocks.0.attn.qkv.input_scale"):
        model.load_state_dict(damaged)


def test_a_checkpoint_of_the_stage_with_real_inputs_fits_the_next_one():
    first = nas.binarize(tiny_vit(), weights=Weights(scale="learned"))
    for layer in nas.binary.layers(first).values():
        layer.weight_scale.data.fill_(2.0)
    second = nas.binarize(tiny_vit(seed=1), weights=Weights(scale="learned"), activations=1)
    second.load_state_dict(first.state_dict())
    assert all((layer.weight_scale == 2).all() for layer in nas.binary.layers(second).values())


@pytest.mark.parametrize("estimator", ["ste", "identity", "bireal", "ede", "dsq", "reste", "biper"])
def test_signs_flip_with_every_estimator(estimator):
    """A sign that never moves passes tests of the loss alone: the rest of the network learns around it."""
    model = nas.binarize(tiny_vit(depth=1), estimator, activations=1)
    before = {name: layer.binary_weight.clone() for name, layer in nas.binary.layers(model).items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 1, 8, 8)).square().sum().backward()
        optimizer.step()
    for name, layer in nas.binary.layers(model).items():
        assert not torch.equal(layer.binary_weight, before[name])


# --- refusals, and a model that stays whole


def with_nan():
    model = tiny_vit()
    model.blocks[1].mlp.fc1.weight.data[2, 3] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (tiny_vit, {"estimator": "rest"}, ValueError, "Did you mean 'reste'"),
        (tiny_vit, {"include": "blocks.*.mpl.fc1"}, nas.NoMatchError, "Did you mean 'blocks.2.mlp.fc1'"),
        (tiny_vit, {"exclude": "blocks.9.*"}, nas.NoMatchError, "'blocks.9.*' matches no layer with weights"),
        (tiny_vit, {"include": "norm1"}, nas.UnsupportedError, "blocks.0.norm1.*LayerNorm cannot be"),
        (tiny_vit, {"include": "blocks.0"}, nas.UnsupportedError, "For the layers inside it: 'blocks.0.*'"),
        (UserNet, {"include": "table"}, nas.UnsupportedError, "max_norm"),
        (UserNet, {"include": "unused", "example_inputs": torch.randn(2, 1, 8, 8)}, nas.UnsupportedError,
         "not called with the example"),
        (tiny_vit, {"exclude": "blocks.*"}, nas.UnsupportedError, "no layer of this Vision.* is left"),
        (tiny_vit, {"weights": 32}, ValueError, "nothing to be binary"),
        (tiny_vit, {"weights": 4}, ValueError, "bits must be 1, 2"),
        (tiny_vit, {"activations": 2}, ValueError, "bits must be 1 or 32"),
        (with_nan, {}, ValueError, "blocks.1.mlp.fc1.weight has 1 values that are not finite"),
        (lambda: nas.binarize(tiny_vit()), {}, nas.UnsupportedError, "blocks.0.attn.qkv: binary already"),
        (tiny_vit, {"activations": 1, "example_inputs": torch.full((2, 1, 8, 8), torch.nan)}, ValueError,
         "first batch has inputs that are not finite"),
    ],
)  # fmt: skip
def test_a_refused_call_says_why_and_leaves_the_model_whole(make, arguments, error, message):
    model = make()
    classes = [type(module) for module in model.modules()]
    names, before = [n for n, _ in model.named_modules()], identities(model)
    with pytest.raises(error, match=message):
        nas.binarize(model, **arguments)
    assert [type(module) for module in model.modules()] == classes
    assert [n for n, _ in model.named_modules()] == names
    assert identities(model) == before


def test_bits_of_a_network_without_binary_layers_cannot_be_set():
    with pytest.raises(nas.NASError, match="has no binary layer"):
        nas.binary.set_bits(tiny_vit(), weights=32)


def test_gpt2_keeps_its_own_kind_of_linear_layers():
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(nas.UnsupportedError, match="Conv1D cannot be, only Linear"):
        nas.binary.plan(nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4), nn.Linear(4, 4)))


def test_layers_made_by_hand_take_the_arguments_of_the_plain_ones():
    net = nn.Sequential(BinaryConv2d(2, 3, 3, padding=1, estimator="bireal", activations=1), nn.Flatten())
    assert net(torch.randn(2, 2, 4, 4)).shape == (2, 48)
    assert list(nas.binary.layers(net)) == ["0"]
