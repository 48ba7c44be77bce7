"""Networks with binary layers as files: bits, scales, nothing latent, and the same outputs bit for bit."""

import math
import struct
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import lightning_nas as nas
from lightning_nas import models
from lightning_nas.binary import Activations, Weights
from lightning_nas.errors import NASError, SavedFolderError, UnsupportedError
from lightning_nas.estimators import STE, BiPer
from lightning_nas.testing import randomise
from tests.saved_folders import description_of, edit_tensors, rewrite

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))
TOKENS = torch.tensor([[3, 7, 9, 4], [1, 2, 30, 49]])


def vit():
    tiny = {"img_size": 16, "patch_size": 4, "embed_dim": 36, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **tiny), IMAGES


def timm_resnet():
    shape = {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 12), "stem_width": 8, "num_classes": 5}
    return timm.create_model("resnet18", **shape), IMAGES


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 50, "hidden_size": 36, "num_attention_heads": 4, "intermediate_size": 70}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes)), {"input_ids": TOKENS}


def bireal():
    return models.ResNet((1, 1), (8, 12), 5, order="bireal", downsample="convolution"), IMAGES


NETWORKS = {"timm ViT": vit, "timm ResNet": timm_resnet, "BERT": bert, "ours": bireal}
FORMS = {
    "a scale a channel": Weights(),
    "a scale a layer, of centred weights": Weights(scale="layer", treatment="centred"),
    "learned scales": Weights(scale="learned"),
    "powers of two, of standardised weights": Weights(scale="power_of_two", treatment="standardised"),
    "no scale": Weights(scale=None),
    "ternary": Weights(bits=2),
    "relative ternary, a scale a layer": Weights(bits=2, scale="layer", is_relative=True),
}
INPUTS = {
    "real inputs": Activations(bits=32),
    "inputs with a learned scale": Activations(),
    "inputs with a threshold": Activations(scale=None, has_threshold=True),
    "inputs as XNOR has them": Activations(scale="xnor"),
}


def binary(network, weights=1, activations=1, estimator="reste", **options):
    model, inputs = NETWORKS[network]()
    model = randomise(model).eval()
    nas.binarize(model, estimator, weights=weights, activations=activations, example_inputs=inputs, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("input_threshold"):
                parameter.normal_()
    return model


def outputs(model, network):
    inputs = NETWORKS[network]()[1]
    with torch.no_grad():
        return model(**inputs).logits if isinstance(inputs, dict) else model(inputs)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("weights", FORMS.values(), ids=FORMS)
def test_a_loaded_network_computes_the_same_bit_for_bit(network, weights, tmp_path):
    for activations in (Activations(bits=32), Activations()):
        model = binary(network, weights, activations)
        loaded = nas.load(nas.save(model, tmp_path))
        assert torch.equal(outputs(loaded, network), outputs(model, network))
        theirs = nas.binary.layers(loaded)
        for name, layer in nas.binary.layers(model).items():
            assert torch.equal(theirs[name].binary_weight, layer.binary_weight)
            assert torch.equal(theirs[name].scale, layer.scale)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("activations", INPUTS.values(), ids=INPUTS)
def test_codes_of_inputs_are_restored(network, activations, tmp_path):
    for estimator in ("bireal", "biper"):
        model = binary(network, 1, activations, estimator)
        loaded = nas.load(nas.save(model, tmp_path))
        assert torch.equal(outputs(loaded, network), outputs(model, network))


def test_inputs_coded_by_a_square_wave_are_restored(tmp_path):
    model = binary("timm ViT", activations=Activations(estimator=BiPer(3.0)))
    loaded = nas.load(nas.save(model, tmp_path))
    assert torch.equal(outputs(loaded, "timm ViT"), outputs(model, "timm ViT"))


@pytest.mark.parametrize("weights", [Weights(), Weights(bits=2), Weights(scale="learned")])
def test_embeddings_are_restored(weights, tmp_path):
    include = ["*word_embeddings", "*dense"]
    model = binary("BERT", weights, include=include)
    loaded = nas.load(nas.save(model, tmp_path))
    assert torch.equal(outputs(loaded, "BERT"), outputs(model, "BERT"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_restored(dtype, tmp_path):
    model = binary("ours").to(dtype)
    loaded = nas.load(nas.save(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES.to(dtype)), model(IMAGES.to(dtype)))


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_bit_for_bit(tmp_path):
    for index, network in enumerate(NETWORKS):
        model = binary(network)
        nas.save(model, tmp_path / str(index))
        inputs = NETWORKS[network]()[1]
        torch.save((inputs, outputs(model, network)), tmp_path / f"{index}.pt")
    code = f"""
import torch, lightning_nas
torch.set_num_threads(1)
for index in range({len(NETWORKS)}):
    model = lightning_nas.load(f"{tmp_path}/{{index}}")
    inputs, expected = torch.load(f"{tmp_path}/{{index}}.pt")
    with torch.no_grad():
        found = model(**inputs).logits if isinstance(inputs, dict) else model(inputs)
    print(torch.equal(found, expected))
"""
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["True"] * len(NETWORKS)


# --- what is in the file


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("bits", [1, 2])
def test_the_file_has_the_size_of_bits_scales_real_numbers_and_header(network, bits, tmp_path, capsys):
    model = binary(network, Weights(bits=bits))
    folder = nas.save(model, tmp_path)
    file = folder / "model.safetensors"
    found = {name: model.get_submodule(name) for name in description_of(folder)["binary"]["layers"]}
    assert found.keys() == nas.binary.layers(model).keys()
    expected = sum(
        bits * 8 * math.ceil(layer.weight[0].numel() / 64) * len(layer.weight)  # rows of 64-bit words
        + 4 * len(layer.weight)  # their scales
        + 2 * 4  # of inputs: scale, and which codes
        for layer in found.values()
    )
    plain, _ = NETWORKS[network]()
    latent = {f"{name}.weight" for name in found}
    before = sum(t.numel() * t.element_size() for t in plain.state_dict().values())
    expected += sum(t.numel() * t.element_size() for n, t in plain.state_dict().items() if n not in latent)
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert file.stat().st_size == 8 + header + expected
    assert f"{len(found)} binary layers as bits: {before:,} bytes became {8 + header + expected:,}" in (
        capsys.readouterr().out
    )


def test_the_bits_of_a_layer_are_the_signs_of_its_weights(tmp_path):
    model = binary("timm ViT")
    tensors = load_file(nas.save(model, tmp_path) / "model.safetensors")
    weight = model.blocks[0].mlp.fc1.weight
    for row, bits in zip(weight.tolist(), tensors["blocks.0.mlp.fc1.weight_codes"].tolist(), strict=True):
        expected = sum(1 << k for k, value in enumerate(row) if value < 0)
        assert int.from_bytes(bytes(bits), "little") == expected
    assert "blocks.0.mlp.fc1.weight" not in tensors


def test_of_a_square_wave_the_bits_are_the_signs_of_the_wave(tmp_path):
    model = binary("timm ViT", estimator="biper", activations=32)
    layer = nas.load(nas.save(model, tmp_path)).blocks[0].mlp.fc1
    wave = torch.sin(20.0 * model.blocks[0].mlp.fc1.weight.detach())
    assert torch.equal(layer.binary_weight, 1.0 - 2.0 * (wave < 0))


def test_the_description_lists_the_layers_and_says_what_runs_them(tmp_path):
    description = description_of(nas.save(binary("BERT", Weights(bits=2)), tmp_path))
    assert description["format_version"] == 2
    assert "only this package" in description["rebuild"]
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["model.safetensors", "network.json"]
    layer = description["binary"]["layers"]["bert.encoder.layer.0.intermediate.dense"]
    assert layer["shape"] == [70, 36]
    assert layer["codes"] == [-1, 0, 1]
    assert layer["scale"] == "channel"
    assert layer["inputs"]["codes"] == [-1, 1]


def test_a_float_network_has_the_folder_that_it_always_had(tmp_path, capsys):
    model, _ = vit()
    description = description_of(nas.save(model, tmp_path))
    assert description["format_version"] == 1
    assert "binary" not in description
    assert capsys.readouterr().out == ""


def test_saving_changes_nothing_in_the_network(tmp_path):
    model = binary("timm ViT")
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    nas.save(model, tmp_path)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    for name, tensor in model.named_parameters():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_a_loaded_network_is_saved_as_the_same_file(tmp_path):
    folder = nas.save(binary("ours", Weights(bits=2)), tmp_path / "first")
    again = nas.save(nas.load(folder), tmp_path / "second")
    assert load_file(again / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    first, second = (description_of(f)["weights"]["sha256"] for f in (folder, again))
    assert first == second


def test_a_binary_subnetwork_is_restored(tmp_path):
    supernet = nas.Supernet(binary("timm ViT", Weights(scale="learned")))
    small = supernet.extract(supernet.space.smallest)
    loaded = nas.load(nas.save(small, tmp_path))
    assert loaded.blocks[0].mlp.fc1.weight.shape == small.blocks[0].mlp.fc1.weight.shape
    assert torch.equal(outputs(loaded, "timm ViT"), outputs(small, "timm ViT"))


# --- training


@pytest.mark.parametrize("weights", [Weights(), Weights(bits=2, scale="learned")])
def test_a_network_saved_behind_its_training_computes_the_same(weights, tmp_path):
    model = binary("ours", weights, estimator="ede")
    before = {name: layer.binary_weight.clone() for name, layer in nas.binary.layers(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    model.eval()
    assert any(
        not torch.equal(layer.binary_weight, before[n]) for n, layer in nas.binary.layers(model).items()
    )
    loaded = nas.load(nas.save(model, tmp_path))
    assert torch.equal(outputs(loaded, "ours"), outputs(model, "ours"))


def test_a_loaded_network_refuses_training_and_names_the_checkpoint(tmp_path):
    loaded = nas.load(nas.save(binary("ours"), tmp_path))
    with pytest.raises(NASError, match="no latent weights.*checkpoint"):
        loaded.train()(IMAGES)
    loaded.eval()
    with pytest.raises(NASError, match="checkpoint"):
        nas.binary.release(loaded)
    nas.binary.set_bits(loaded, weights=32)
    with pytest.raises(NASError, match="checkpoint"):
        loaded(IMAGES)


def test_the_real_layers_of_a_loaded_network_can_be_trained(tmp_path):
    loaded = nas.load(nas.save(binary("ours"), tmp_path))
    loaded(IMAGES).sum().backward()
    assert loaded.head.weight.grad is not None
    assert loaded.stem[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for layer in nas.binary.layers(loaded).values() for p in layer.parameters())


# --- what is refused, before anything is written


class Own(STE):
    def forward(self, x):
        return super().forward(x + 1)


def first_stage():
    return binary("ours", estimator=BiPer(stage=1))


def first_stage_of_inputs():
    return binary("ours", activations=Activations(estimator=BiPer(stage=1)))


def real_for_now():
    model = binary("ours")
    nas.binary.set_bits(model, weights=32)
    return model


def inputs_real_for_now():
    model = binary("ours")
    nas.binary.set_bits(model, activations=32)
    return model


def without_inputs():
    return nas.binarize(bireal()[0], activations=1)


def own_codes():
    return binary("ours", activations=Activations(estimator=Own()))


def only_inputs():
    return binary("ours", weights=32)


def not_finite():
    model = binary("ours")
    model.stages[0][0].branch1.conv.weight.data[0, 0, 0, 0] = float("nan")
    return model


def scale_not_finite():
    model = binary("ours", Weights(scale="learned"))
    model.stages[0][0].branch1.conv.weight_scale.data[0] = float("inf")
    return model


def shared():
    model = binary("timm ViT", include="blocks.*")
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    return model


def changed():
    model = binary("ours")
    model.stages[0][0].act1 = nn.ReLU()
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (first_stage, UnsupportedError, "branch1.conv is not binary yet.*stage=1"),
        (first_stage_of_inputs, UnsupportedError, "inputs that are not binary yet.*stage=1"),
        (real_for_now, UnsupportedError, "runs with real numbers for now.*set_bits"),
        (inputs_real_for_now, UnsupportedError, "runs with real numbers for now.*set_bits"),
        (without_inputs, UnsupportedError, "has seen no inputs.*calibrate"),
        (own_codes, UnsupportedError, "whose forward is its own"),
        (only_inputs, UnsupportedError, "nothing to pack.*checkpoint"),
        (not_finite, ValueError, "branch1.conv has weights that are not finite"),
        (scale_not_finite, ValueError, "branch1.conv has scales that are not finite"),
        (shared, UnsupportedError, "one tensor.*Untie"),
        (changed, UnsupportedError, "'stages.0.0.act1' is ReLU"),
    ],
)
def test_what_a_file_of_codes_could_not_restore_is_refused(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        nas.save(make(), tmp_path / "it")
    assert not (tmp_path / "it").exists()


# --- damaged folders

LAYER = "stages.0.0.branch1.conv"


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def without_bits(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{LAYER}.weight_codes"))


def without_scale(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{LAYER}.weight_scale"))


def with_short_rows(folder):
    def shorten(tensors):
        tensors[f"{LAYER}.weight_codes"] = tensors[f"{LAYER}.weight_codes"][:, :8].clone()

    edit_tensors(folder, shorten)


def with_other_form(**entries):
    def change(folder):
        found = description_of(folder)["binary"]
        found["layers"][LAYER].update(entries)
        rewrite(folder, binary=found)

    return change


def with_another_layer(folder):
    found = description_of(folder)["binary"]
    found["layers"]["stages.9.conv"] = found["layers"][LAYER]
    rewrite(folder, binary=found)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "truncated"),
        (flip_a_bit, "SHA-256"),
        (without_bits, f"{LAYER}.weight_codes is missing"),
        (without_scale, f"{LAYER}.weight_scale is missing"),
        (with_short_rows, r"take uint8 bits of shape \(8, 16\)"),
        (with_other_form(codes=[-1, 0, 1]), "another number of planes"),
        (with_other_form(shape=[8, 8, 1, 1]), "take uint8 bits"),
        (with_other_form(dtype="float31"), "cannot be a binary layer"),
        (with_other_form(inputs={}), "cannot be a binary layer"),
        (with_another_layer, "'stages.9.conv' cannot be a binary layer"),
        (lambda folder: rewrite(folder, binary=None), "lacks its binary layers"),
        (lambda folder: rewrite(folder, format_version=3), "format version 3.*reads 1 and 2"),
    ],
)
def test_a_damaged_folder_is_refused(damage, message, tmp_path):
    folder = nas.save(binary("ours"), tmp_path)
    damage(folder)
    with pytest.raises(SavedFolderError, match=message):
        nas.load(folder)
