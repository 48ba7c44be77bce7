import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from lightning_nas.errors import SavedFolderError, UnsupportedError
from lightning_nas.saving import load, save
from lightning_nas.supernet import Supernet

HEAD = 8
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
THREE_THINGS = partial(ParallelThingsBlock, num_parallel=3)
FILES = {"model.safetensors", "network.json"}


def rows(linear, index, groups=1):
    """Keep some output rows of a linear layer, the same in each of its groups of rows."""
    weight = linear.weight.data
    linear.weight = nn.Parameter(weight.unflatten(0, (groups, -1))[:, index].flatten(0, 1).clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data.unflatten(0, (groups, -1))[:, index].flatten().clone())
    linear.out_features = len(linear.weight)


def columns(linear, index):
    linear.weight = nn.Parameter(linear.weight.data[:, index].clone())
    linear.in_features = linear.weight.shape[1]


def cut_heads(attention, heads):
    kept = torch.arange(heads * HEAD)
    rows(attention.qkv, kept, groups=3)
    columns(attention.proj, kept)
    attention.num_heads, attention.attn_dim = heads, heads * HEAD


def cut_mlp(mlp, width):
    kept = torch.arange(width)
    if isinstance(mlp, SwiGLU):
        rows(mlp.fc1_g, kept)
        rows(mlp.fc1_x, kept)
    else:
        rows(mlp.fc1, kept, groups=2 if hasattr(mlp, "gate_last") else 1)
    columns(mlp.fc2, kept)


def keep_blocks(model, kept):
    model.blocks = nn.Sequential(*(model.blocks[i] for i in kept))


def cut(model, heads=None, mlp=None, blocks=None):
    if blocks:
        keep_blocks(model, blocks)
    for i, block in enumerate(model.blocks):
        for attention in [part.attn for part in block.attns] if hasattr(block, "attns") else [block.attn]:
            if heads:
                cut_heads(attention, heads[i])
        for feed_forward in [part.mlp for part in block.ffns] if hasattr(block, "ffns") else [block.mlp]:
            if mlp:
                cut_mlp(feed_forward, mlp[i])
    return model


def vit(**settings):
    return VisionTransformer(**{**TINY, **settings})


def unfused(model):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def narrow_parallel():
    model = vit(block_fn=ParallelScalingBlock)
    for block, width in zip(model.blocks, (50, 64, 128, 31), strict=True):
        kept = torch.cat([torch.arange(width), torch.arange(block.in_split[0], block.in_proj.out_features)])
        rows(block.in_proj, kept)
        columns(block.mlp_out_proj, torch.arange(width))
        block.in_split = [width, *block.in_split[1:]]
    return model


def tied():
    model = VisionTransformerDistilled(**TINY)
    model.head_dist.weight = model.head.weight
    return model


def from_timm(name="vit_tiny_patch16_224", **settings):
    return timm.create_model(name, **{**TINY, **settings})


# What timm.create_model can say: all heads, one MLP width, any depth.
EXPRESSIBLE = {
    "whole": lambda: from_timm(drop_path_rate=0.1),
    "fewer blocks": lambda: cut(from_timm(drop_path_rate=0.1), blocks=(0, 2)),
    "one smaller MLP width": lambda: cut(from_timm(), mlp=(50, 50, 50, 50)),
    "distilled, fewer blocks": lambda: cut(from_timm("deit_tiny_distilled_patch16_224"), blocks=(0, 3)),
    "register tokens": lambda: cut(from_timm(reg_tokens=3, no_embed_class=True), blocks=(0, 1)),
    "average pooling": lambda: from_timm(global_pool="avg", class_token=False),
    "attention pooling": lambda: from_timm(global_pool="map", class_token=False),
    "no classes": lambda: from_timm(num_classes=0),
    "dinov2 giant": lambda: from_timm("vit_giant_patch14_dinov2"),
    "clip": lambda: from_timm("vit_base_patch16_clip_224"),
    "rectangular images": lambda: from_timm(img_size=(8, 16), patch_size=(4, 2), in_chans=1),
    "no tag, swiglu packed": lambda: vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU),
    "no tag, parallel": lambda: vit(block_fn=ParallelThingsBlock, init_values=0.1),
    "other norm and activation": lambda: vit(norm_layer="rmsnorm", act_layer="quick_gelu", pre_norm=True),
}
# What it cannot say.
OTHERS = {
    "heads cut": lambda: cut(from_timm(), heads=(1, 4, 2, 3)),
    "MLP cut by block": lambda: cut(from_timm(), mlp=(7, 128, 64, 33)),
    "all cut": lambda: cut(from_timm(drop_path_rate=0.3), heads=(1, 3), mlp=(64, 9), blocks=(1, 3)),
    "equal heads, fewer": lambda: cut(from_timm(), heads=(2, 2, 2, 2)),
    "distilled DeiT": lambda: cut(from_timm("deit_tiny_distilled_patch16_224"), (2, 1, 4, 3), (9, 8, 7, 6)),
    "LayerScale": lambda: cut(vit(init_values=1e-2), (2, 1, 4, 3), (9, 8, 7, 6)),
    "qk-norm": lambda: cut(vit(qk_norm=True, qkv_bias=False), (2, 1, 4, 3), (9, 8, 7, 6)),
    "register tokens cut": lambda: cut(vit(reg_tokens=2), (2, 1, 4, 3), (9, 8, 7, 6)),
    "average pooling cut": lambda: cut(vit(global_pool="avg", class_token=False), (2, 1, 4, 3)),
    "attention pooling cut": lambda: cut(
        vit(global_pool="map", class_token=False), (2, 1, 4, 3), (9, 8, 7, 6)
    ),
    "SwiGLU packed": lambda: cut(vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU), (2, 1, 4, 3), (9, 8, 7, 6)),
    "SwiGLU": lambda: cut(vit(mlp_layer=SwiGLU, act_layer=nn.SiLU), (2, 1, 4, 3), (9, 8, 7, 6)),
    "no classes cut": lambda: cut(vit(num_classes=0), (2, 1, 4, 3), (9, 8, 7, 6)),
    "parallel things": lambda: cut(
        vit(block_fn=partial(ParallelThingsBlock, num_parallel=3)), (2, 1, 4, 3), (9, 8, 7, 6)
    ),
    "post-norm": lambda: cut(vit(block_fn=ResPostBlock, init_values=0.5), (2, 1, 4, 3), (9, 8, 7, 6)),
    "parallel scaling": narrow_parallel,
    "torch norms": lambda: cut(vit(norm_layer=partial(nn.LayerNorm, eps=1e-3)), (2, 1, 4, 3)),
    "unfused": lambda: unfused(cut(vit(), (2, 1, 4, 3))),
    "differential, fewer blocks": lambda: cut(vit(attn_layer="diff"), blocks=(1, 3)),
    "tied heads": tied,
    "bfloat16": lambda: cut(vit(), (2, 1, 4, 3)).to(torch.bfloat16),
    "half": lambda: cut(vit(), mlp=(9, 8, 7, 6)).to(torch.float16),
}
VARIANTS = {**EXPRESSIBLE, **OTHERS}


def randomised(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():  # ones and zeros would hide a tensor that was not restored
        tensor.data = (torch.randn(tensor.shape, generator=generator) * 0.3).to(tensor.dtype)
    return model.eval()


def images_for(model):
    shape = (3, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(
        model.patch_embed.proj.weight.dtype
    )


def outputs(model, images):
    with torch.no_grad():
        return model(images)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every variant: its network, and the folder it was saved in with its inputs and outputs beside."""
    root, result = tmp_path_factory.mktemp("saved"), {}
    for number, (name, make) in enumerate(VARIANTS.items()):
        model = randomised(make(), number)
        folder = save(model, root / f"network{number}")
        images = images_for(model)
        data = {"images": images, "outputs": outputs(model, images).contiguous()}
        safetensors.torch.save_file(data, root / f"network{number}.safetensors")
        result[name] = (model, folder)
    return result


@pytest.fixture(scope="module")
def fresh(saved):
    """What a process without this package finds: how each folder was rebuilt, and whether outputs agree."""
    script = """
import contextlib, io, json, runpy, sys
from pathlib import Path
sys.modules["lightning_nas"] = None
import timm, torch
from safetensors.torch import load_file

found = {}
for folder in map(Path, sys.argv[1:]):
    description = json.loads((folder / "network.json").read_text())
    if description["timm"]:
        model = timm.create_model(description["timm"]["name"], **description["timm"]["kwargs"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        model.eval()
        how = "create_model"
    else:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            names = runpy.run_path(str(folder / "network.py"), run_name="__main__")
        model, how = names["network"], "network.py"
    data = load_file(folder.with_suffix(".safetensors"))
    with torch.no_grad():
        aligned = all(p.data_ptr() % 64 == 0 for p in model.parameters())
        found[folder.name] = [how, aligned and torch.equal(model(data["images"]), data["outputs"])]
        if how == "network.py":
            found[folder.name].append(printed.getvalue())
try:
    import lightning_nas
except ImportError:
    print(json.dumps(found))
"""
    folders = [str(folder) for _, folder in saved.values()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", script, *folders]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loaded_network_gives_the_saved_ones_outputs_bit_for_bit(saved, name):
    model, folder = saved[name]
    again = load(folder)
    assert not again.training
    assert torch.equal(outputs(again, images_for(model)), outputs(model, images_for(model)))
    assert {k: (v.dtype, v.shape) for k, v in again.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in model.state_dict().items()
    }


def test_loaded_weights_lie_aligned_in_memory_so_that_kernels_round_as_they_did(tmp_path):
    # Wide enough for kernels that treat memory at odd addresses differently.
    model = randomised(vit(img_size=112, patch_size=8, embed_dim=384, depth=1, num_heads=6), 0)
    again = load(save(model, tmp_path))
    assert all(parameter.data_ptr() % 64 == 0 for parameter in again.parameters())
    assert torch.equal(outputs(again, images_for(model)), outputs(model, images_for(model)))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_shape_that_timm_can_express_is_rebuilt_by_create_model_without_this_package(saved, fresh, name):
    assert fresh[saved[name][1].name] == ["create_model", True]
    assert {path.name for path in saved[name][1].iterdir()} == FILES


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_any_other_shape_is_rebuilt_by_its_generated_file_without_this_package(saved, fresh, name):
    assert fresh[saved[name][1].name][:2] == ["network.py", True]
    assert {path.name for path in saved[name][1].iterdir()} - {"__pycache__"} == {*FILES, "network.py"}


@pytest.mark.parametrize("name", ["all cut", "parallel things", "tied heads", "differential, fewer blocks"])
def test_a_generated_file_is_formatted_and_names_only_what_it_uses(saved, name):
    file = saved[name][1] / "network.py"
    for check in (["format", "--isolated", "--check"], ["check", "--isolated", "--select=E4,E7,E9,F,I"]):
        subprocess.run([sys.executable, "-m", "ruff", *check, str(file)], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_generated_file_run_as_a_command_prints_the_size_of_the_network(saved, fresh, name):
    model, folder = saved[name]
    count, width = sum(p.numel() for p in model.parameters()), 32 if "no classes" in name else 5
    expected = f"{type(model).__name__}: {count:,} parameters, output (1, {width})\n"
    assert fresh[folder.name][2] == expected


@pytest.mark.parametrize("name", ["fewer blocks", "all cut", "tied heads"])
def test_saving_a_loaded_network_writes_the_same_bytes(saved, tmp_path, name):
    folder = saved[name][1]
    again = save(load(folder), tmp_path / "again")
    for file in again.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes()


def test_parameters_that_were_one_are_one_again(saved):
    model = load(saved["tied heads"][1])
    assert model.head_dist.weight is model.head.weight


def test_drop_path_rates_of_the_kept_blocks_are_restored(saved):
    model, folder = saved["all cut"]
    kept = [block.drop_path1.drop_prob for block in model.blocks]
    assert kept == pytest.approx([0.1, 0.3])
    assert [block.drop_path1.drop_prob for block in load(folder).blocks] == kept


def test_the_preprocessing_of_a_loaded_network_is_the_saved_ones(saved):
    model, folder = saved["clip"]
    found = timm.data.resolve_model_data_config(load(folder))
    assert found["input_size"] == (3, 16, 16)
    for key in ("mean", "std", "interpolation", "crop_pct"):
        assert found[key] == model.pretrained_cfg[key]


def test_the_architecture_and_metrics_are_kept_with_the_network(tmp_path):
    save(
        vit(),
        tmp_path,
        architecture={"depth": 4},
        metrics={"accuracy": torch.tensor(0.5), "macs": np.int64(10)},
    )
    description = json.loads((tmp_path / "network.json").read_text())
    assert description["architecture"] == {"depth": 4}
    assert description["metrics"] == {"accuracy": 0.5, "macs": 10}


def test_an_extracted_subnetwork_is_restored_with_the_supernets_outputs(tmp_path):
    supernet = Supernet(randomised(from_timm(), 0))
    images = images_for(supernet.model)
    for seed in range(3):
        architecture = supernet.space.sample(np.random.default_rng(seed))
        folder = save(supernet.extract(architecture), tmp_path / "it", architecture=architecture)
        assert json.loads((folder / "network.json").read_text())["architecture"] == dict(architecture)
        with supernet.using(architecture):
            assert torch.equal(outputs(load(folder), images), outputs(supernet.model, images))


def test_a_compiled_network_is_saved_as_the_network_it_compiles(tmp_path):
    model = randomised(vit(), 0)
    images = images_for(model)
    assert torch.equal(outputs(load(save(torch.compile(model), tmp_path)), images), outputs(model, images))


@pytest.mark.slow
def test_onnx_runtime_agrees_and_the_file_shrinks_by_four_bytes_a_parameter(saved, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    models = {
        "small": load(saved["SwiGLU packed"][1]),
        "whole": randomised(vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU), 0),
    }
    images, sizes = images_for(models["small"]), {}
    for kind, model in models.items():
        file = tmp_path / f"{kind}.onnx"
        torch.onnx.export(model, (images,), file, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), outputs(model, images), atol=1e-4, rtol=1e-4)
        sizes[kind] = file.stat().st_size
    counts = {kind: sum(p.numel() for p in model.parameters()) for kind, model in models.items()}
    predicted = 4 * (counts["whole"] - counts["small"])
    assert sizes["whole"] - sizes["small"] == pytest.approx(
        predicted, rel=0.02
    )  # both graphs have the same nodes


# --- what is refused, before anything is written


def with_change(change):
    model = vit()
    change(model)
    return model


REFUSED = {
    "no supported network": (
        lambda: nn.Linear(2, 2),
        "torch.nn.modules.linear.Linear cannot be saved; supported are",
    ),
    "network inside": (lambda: nn.ModuleDict({"net": vit()}), "sub-module 'net' is one"),
    "elastic": (lambda: with_change(Supernet), r"still elastic .* Extract first"),
    "strange layer": (
        lambda: with_change(lambda m: setattr(m, "head", nn.Bilinear(4, 8, 5))),
        "'head' is a Bilinear",
    ),
    "strange norm": (
        lambda: vit(norm_layer=nn.BatchNorm1d),
        "blocks.0 uses torch.nn.modules.batchnorm.BatchNorm1d",
    ),
    "new layer": (
        lambda: with_change(lambda m: m.add_module("extra", nn.Linear(2, 2))),
        "'extra' is a Linear",
    ),
    "own forward": (lambda: with_change(lambda m: setattr(m, "forward", lambda x: x)), "attribute 'forward'"),
    "sliced blocks": (
        lambda: with_change(lambda m: setattr(m, "blocks", m.blocks[1:])),
        "must be named 0, 1, 2",
    ),
    "no blocks": (
        lambda: with_change(lambda m: setattr(m, "blocks", nn.Sequential())),
        "must be named 0, 1, 2",
    ),
    "other shape": (
        lambda: with_change(lambda m: setattr(m.blocks[1].norm1, "weight", nn.Parameter(torch.ones(9)))),
        "'blocks.1.norm1.weight' has the shape",
    ),
    "lost buffer": (
        lambda: with_change(lambda m: m.register_buffer("cache", torch.ones(1), persistent=False)),
        "buffer 'cache'",
    ),
    "no values": (lambda: vit().to("meta"), "holds no values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rebuilt_is_refused_before_anything_is_written(tmp_path, name):
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        save(make(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_subclass_is_refused_because_it_may_compute_anything(tmp_path):
    class Mine(VisionTransformer):
        pass

    with pytest.raises(UnsupportedError, match="Mine cannot be saved"):
        save(Mine(**TINY), tmp_path)


def test_what_is_no_module_is_a_type_error(tmp_path):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got dict"):
        save({}, tmp_path)


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), ([1], TypeError)])
def test_a_metric_that_json_cannot_hold_is_refused(tmp_path, value, error):
    with pytest.raises(error, match="accuracy"):
        save(vit(), tmp_path / "folder", metrics={"accuracy": value})
    assert not (tmp_path / "folder").exists()


# --- the folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_of_ours_is_overwritten_and_other_files_in_it_stay(tmp_path):
    save(cut(vit(), heads=(1, 2, 3, 4)), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save(from_timm(), tmp_path)
    assert set(contents(tmp_path)) == {*FILES, "notes.txt"}  # no network.py of the earlier network
    assert len(load(tmp_path).blocks) == 4


@pytest.mark.parametrize("stranger", ["weights.pt", "network.json"])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, stranger):
    (tmp_path / stranger).write_text("{}")
    with pytest.raises(SavedFolderError, match="not empty"):
        save(vit(), tmp_path)
    assert contents(tmp_path) == {stranger: b"{}"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SavedFolderError, match="is a file"):
        save(vit(), tmp_path / "file")


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("failing", ["lightning_nas.saving.save_file", "lightning_nas.saving.os.replace"])
def test_an_interrupted_save_leaves_the_earlier_network_or_nothing(tmp_path, monkeypatch, failing, earlier):
    folder = tmp_path / "folder"
    if earlier:
        save(cut(vit(), heads=(1, 2, 3, 4)), folder)
    before = contents(folder) if earlier else None

    def full_disk(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(failing, full_disk)
    with pytest.raises(OSError, match="disk full"):
        save(vit(), folder)
    assert contents(folder) == before if earlier else not folder.exists()
    assert not any(path.is_dir() for path in tmp_path.glob("folder/*"))


def test_weights_of_another_save_beside_an_old_description_do_not_load(tmp_path):
    first, second = save(randomised(vit(), 0), tmp_path / "a"), save(randomised(vit(), 1), tmp_path / "b")
    (first / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes())
    with pytest.raises(SavedFolderError, match="SHA-256"):
        load(first)


# --- damaged folders


def rewrite(folder, **changes):
    file = folder / "network.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_byte(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def lie_about_weights(folder, change):
    """Weights that are another network's, with a description that vouches for them."""
    file = folder / "model.safetensors"
    change(file)
    description = json.loads((folder / "network.json").read_text())
    data = file.read_bytes()
    description["weights"].update(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    (folder / "network.json").write_text(json.dumps(description))


def edit_tensors(edit):
    def change(file):
        tensors = safetensors.torch.load_file(file)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        edit(tensors)
        safetensors.torch.save_file(tensors, file)

    return lambda folder: lie_about_weights(folder, change)


def other_network(folder):
    network = json.loads((folder / "network.json").read_text())["network"]
    rewrite(folder, network={**network, "arguments": {**network["arguments"], "num_heads": 5}})


DAMAGES = {
    "no JSON": (lambda f: (f / "network.json").unlink(), "has no network.json"),
    "half a JSON": (lambda f: (f / "network.json").write_text('{"format": "light'), "not readable JSON"),
    "binary JSON": (lambda f: (f / "network.json").write_bytes(b"\xff\xfe\x00"), "not readable JSON"),
    "a list": (lambda f: (f / "network.json").write_text("[]"), "was not written by nas.save"),
    "another's JSON": (lambda f: rewrite(f, format="else"), "was not written by nas.save"),
    "a newer format": (
        lambda f: rewrite(f, format_version=99),
        "format version 99, this lightning-nas reads 1",
    ),
    "an unknown family": (
        lambda f: rewrite(f, family="os.system"),
        "'os.system', which is unknown.*timm_vit",
    ),
    "no network": (lambda f: rewrite(f, network=None), "lacks 'network'"),
    "an impossible network": (other_network, "describes a network that cannot be built"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "truncated weights": (truncate, "it was truncated or replaced"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "has 0 bytes"),
    "altered weights": (flip_a_byte, "SHA-256"),
    "a broken header": (lambda f: lie_about_weights(f, lambda w: w.write_bytes(b"\xff" * 64)), "is damaged"),
    "a missing tensor": (edit_tensors(lambda t: t.pop("head.bias")), "head.bias is missing"),
    "a tensor too many": (edit_tensors(lambda t: t.update(x=torch.ones(1))), "x is not part of the network"),
    "another shape": (
        edit_tensors(lambda t: t.update({"head.bias": torch.ones(6)})),
        r"head.bias is \(6,\), exp",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_says_which_file_and_what_to_do(tmp_path, name):
    damage, message = DAMAGES[name]
    folder = save(vit(), tmp_path / "folder")
    damage(folder)
    with pytest.raises(SavedFolderError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SavedFolderError, match="there is no folder"):
        load(tmp_path / "nowhere")


def test_loading_runs_no_code_of_the_folder_and_unpickles_nothing(tmp_path, monkeypatch):
    folder = save(cut(vit(), heads=(1, 2, 3, 4)), tmp_path)
    (folder / "network.py").write_text("raise SystemExit('code of the folder ran')")

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("torch.load", refuse)
    assert len(load(Path(folder)).blocks) == 4
