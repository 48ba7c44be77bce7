"""Networks of timm, whole and cut, through ``save`` and ``load``."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import RmsNorm, SwiGLU, SwiGLUPacked
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.deit import VisionTransformerDistilled
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import nn

from lightning_nas.errors import SavedFolderError, UnsupportedError
from lightning_nas.saving import load, save
from lightning_nas.supernet import Supernet, add_kernel_transforms, default_space
from lightning_nas.testing import randomise
from tests.saved_folders import MISSING, description_of, rewrite_network

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
RESNET = {"layers": (1, 3, 1, 1), "channels": (16, 16, 16, 24), "num_classes": 5}
SWIN = {
    "img_size": 32, "embed_dim": 8, "depths": (2, 4), "num_heads": (2, 4), "window_size": 4, "num_classes": 5,
}  # fmt: skip
WIDTHS = {"width": (0.5, 1.0), "depth": (0.5, 1.0)}


def vit(name="vit_tiny_patch16_224", **settings):
    return timm.create_model(name, **{**VIT, **settings})


def resnet(name="resnet18", **settings):
    return timm.create_model(name, **{**RESNET, **settings})


def mobilenet(name="mobilenetv3_small_050", **settings):
    return timm.create_model(name, **{"num_classes": 5, **settings})


def swin(**settings):
    return timm.create_model("swin_tiny_patch4_window7_224", **{**SWIN, **settings})


def cut(model, **options):
    """A subnetwork drawn at random, with statistics of its own."""
    randomise(model).eval()
    supernet = Supernet(model, default_space(model, **options))
    rng = np.random.default_rng(0)
    architecture = next(
        a for a in iter(partial(supernet.space.sample, rng), None) if a != supernet.space.largest
    )
    with supernet.using(architecture):
        supernet.recalibrate([(images_for(model),)], samples=4)
    return supernet.extract(architecture)


def with_change(model, change):
    change(model)
    return model


def unfused(model):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def keep_blocks(model, *kept):
    model.blocks = nn.Sequential(*(model.blocks[i] for i in kept))
    return model


def tied(model):
    model.head_dist.weight = model.head.weight
    return model


def as_older_timm_made_it(model):
    del model._model_args
    return model


# What timm.create_model can say.
EXPRESSIBLE = {
    "ViT": lambda: vit(drop_path_rate=0.1),
    "ViT, fewer blocks": lambda: cut(vit(drop_path_rate=0.1), depth=(2, 3), heads=(4,), mlp=(128,)),
    "distilled ViT": lambda: vit("deit_tiny_distilled_patch16_224"),
    "register tokens": lambda: vit(reg_tokens=3, no_embed_class=True),
    "average pooling": lambda: vit(global_pool="avg", class_token=False),
    "attention pooling": lambda: vit(global_pool="map", class_token=False),
    "ViT, no classes": lambda: vit(num_classes=0),
    "dinov2 giant": lambda: vit("vit_giant_patch14_dinov2"),
    "clip": lambda: vit("vit_base_patch16_clip_224"),
    "rectangular images": lambda: vit(img_size=(8, 16), patch_size=(4, 2), in_chans=1),
    "other norm and activation": lambda: vit(norm_layer="rmsnorm", act_layer="quick_gelu", pre_norm=True),
    "classes changed later": lambda: with_change(resnet(), lambda m: m.reset_classifier(3)),
    "ResNet": resnet,
    "ResNet, no classes": lambda: resnet(num_classes=0),
    "EfficientNet": lambda: mobilenet("test_efficientnet"),
    "MobileNetV3, no classes": lambda: mobilenet(num_classes=0),
    "Swin": swin,
    "a network without a family": lambda: mobilenet("test_convnext"),
}
# What it cannot say.
OTHERS = {
    "ViT cut": lambda: cut(vit(drop_path_rate=0.3), depth=(2, 3)),
    "ViT, narrower": lambda: cut(vit(), embed=(0.5, 0.75)),
    "distilled ViT cut": lambda: cut(vit("deit_tiny_distilled_patch16_224")),
    "LayerScale": lambda: cut(vit(init_values=1e-2)),
    "qk-norm": lambda: cut(vit(qk_norm=True, qkv_bias=False)),
    "attention pooling cut": lambda: cut(vit(global_pool="map", class_token=False)),
    "SwiGLU packed": lambda: cut(vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU)),
    "SwiGLU": lambda: cut(vit(mlp_layer=SwiGLU, act_layer=nn.SiLU)),
    "ViT, no classes, cut": lambda: cut(vit(num_classes=0)),
    "parallel things": lambda: cut(vit(block_fn=partial(ParallelThingsBlock, num_parallel=3))),
    "post-norm": lambda: cut(vit(block_fn=ResPostBlock, init_values=0.5)),
    "parallel scaling": lambda: cut(vit(block_fn=ParallelScalingBlock)),
    "torch norms": lambda: cut(vit(norm_layer=partial(nn.LayerNorm, eps=1e-3))),
    "unfused": lambda: unfused(cut(vit())),
    "differential, fewer blocks": lambda: keep_blocks(vit(attn_layer="diff"), 1, 3),
    "tied heads": lambda: tied(vit("deit_tiny_distilled_patch16_224")),
    "bfloat16": lambda: cut(vit()).to(torch.bfloat16),
    "half": lambda: vit().to(torch.float16),
    "ResNet cut": lambda: cut(resnet(drop_path_rate=0.2), **WIDTHS),
    "ResNet of bottlenecks": lambda: cut(resnet("resnet50"), **WIDTHS),
    "ResNet-D with SE": lambda: cut(resnet("seresnet50", stem_type="deep", avg_down=True, stem_width=8)),
    "ResNeXt, no classes": lambda: cut(
        resnet("resnext50_32x4d", num_classes=0, cardinality=4, base_width=32)
    ),
    "both poolings": lambda: cut(resnet(global_pool="catavgmax"), **WIDTHS),
    "MobileNetV3 cut": lambda: cut(mobilenet(drop_path_rate=0.2), **WIDTHS),
    "MobileNetV3 padded on one side": lambda: cut(mobilenet("tf_mobilenetv3_small_075"), **WIDTHS),
    "transformed kernels": lambda: cut(add_kernel_transforms(mobilenet()), kernel=(3,)),
    "EfficientNet, no classes, cut": lambda: cut(mobilenet("test_efficientnet", num_classes=0)),
    "Swin cut": lambda: cut(swin(drop_path_rate=0.2), depth=(0.5, 1.0)),
    "Swin, no classes, padded windows": lambda: cut(swin(num_classes=0, img_size=(40, 28)), depth=(0.5, 1.0)),
    "Swin of any image size": lambda: cut(swin(strict_img_size=False)),
    "Swin in bfloat16": lambda: cut(swin()).to(torch.bfloat16),
    "a head of one's own": lambda: with_change(
        resnet(num_classes=0), lambda m: setattr(m, "fc", nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 7)))
    ),
    "kernel matrices": lambda: add_kernel_transforms(mobilenet()),
    "an older timm": lambda: as_older_timm_made_it(cut(resnet("resnet18", layers=(2, 2, 2, 2)))),
    "made without create_model": lambda: ResNet(Bottleneck, **RESNET),
    "distilled, made without create_model": lambda: VisionTransformerDistilled(**VIT),
}
VARIANTS = {**EXPRESSIBLE, **OTHERS}


def images_for(model, batch=4):
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    size = model.patch_embed.img_size if hasattr(model, "patch_embed") else (32, 32)
    images = torch.randn(batch, stem.in_channels, *size, generator=torch.Generator().manual_seed(7))
    return images.to(stem.weight.dtype)


def outputs(model):
    with torch.no_grad():
        return model(images_for(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every variant: its network, and the folder it was saved in with its inputs and outputs beside."""
    root, result = tmp_path_factory.mktemp("saved"), {}
    for number, (name, make) in enumerate(VARIANTS.items()):
        model = randomise(make(), number).eval()
        folder = save(model, root / f"network{number}")
        data = {"images": images_for(model), "outputs": outputs(model).contiguous()}
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
    assert type(again) is type(model)
    assert not again.training
    assert torch.equal(outputs(again), outputs(model))
    assert {k: (v.dtype, v.shape) for k, v in again.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in model.state_dict().items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_shape_that_timm_can_express_is_rebuilt_by_create_model_without_this_package(saved, fresh, name):
    folder = saved[name][1]
    assert fresh[folder.name] == ["create_model", True]
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "network.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_any_other_shape_is_rebuilt_by_its_generated_file_which_tells_its_size(saved, fresh, name):
    model, folder = saved[name]
    count = sum(p.numel() for p in model.parameters())
    assert fresh[folder.name] == ["network.py", True, f"{type(model).__name__}: {count:,} parameters\n"]


@pytest.mark.parametrize("name", ["ViT cut", "ResNet of bottlenecks"])
def test_a_generated_file_is_formatted_and_names_only_what_it_uses(saved, name):
    file = saved[name][1] / "network.py"
    for check in (
        ["format", "--isolated", "--check", "--line-length=110"],
        ["check", "--isolated", "--select=E4,E7,E9,F,I"],
    ):
        subprocess.run([sys.executable, "-m", "ruff", *check, str(file)], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["ViT, fewer blocks", "MobileNetV3 cut", "Swin cut", "tied heads"])
def test_saving_a_loaded_network_writes_the_same_bytes(saved, tmp_path, name):
    folder = saved[name][1]
    again = save(load(folder), tmp_path / "again")
    for file in again.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes()


def test_loaded_weights_lie_aligned_in_memory_so_that_kernels_round_as_they_did(tmp_path):
    # Wide enough for kernels that treat memory at odd addresses differently.
    model = randomise(vit(img_size=112, patch_size=8, embed_dim=384, depth=1, num_heads=6)).eval()
    again = load(save(model, tmp_path))
    assert all(parameter.data_ptr() % 64 == 0 for parameter in again.parameters())
    assert torch.equal(outputs(again), outputs(model))


def test_parameters_that_were_one_are_one_again(saved):
    model = load(saved["tied heads"][1])
    assert model.head_dist.weight is model.head.weight


@pytest.mark.parametrize("name", ["ViT cut", "ResNet cut", "MobileNetV3 cut", "Swin cut"])
def test_drop_path_rates_of_the_kept_blocks_are_restored(saved, name):
    def rates(model):
        return {path: m.drop_prob for path, m in model.named_modules() if hasattr(m, "drop_prob")}

    model, folder = saved[name]
    assert rates(model)
    assert rates(load(folder)) == rates(model)


@pytest.mark.parametrize("name", ["ResNet cut", "MobileNetV3 cut"])
def test_what_timm_records_about_the_stages_is_restored(saved, name):
    model, folder = saved[name]
    assert load(folder).feature_info == model.feature_info


def test_the_preprocessing_of_a_loaded_network_is_the_saved_ones(saved, tmp_path):
    model, folder = saved["clip"]
    changed = vit("vit_base_patch16_clip_224")
    changed.pretrained_cfg = {**changed.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    for network, again in ((model, load(folder)), (changed, load(save(changed, tmp_path)))):
        found, expected = (timm.data.resolve_model_data_config(m) for m in (again, network))
        assert found == expected


def test_a_subnetwork_of_a_loaded_subnetwork_is_saved_again(saved, tmp_path):
    model = cut(load(saved["MobileNetV3 cut"][1]), expand=(0.5, 1.0), depth=(1, 1.0))
    assert torch.equal(outputs(load(save(model, tmp_path))), outputs(model))


def test_saving_and_loading_leave_the_network_and_random_numbers_alone(tmp_path):
    model = with_change(
        randomise(swin()).train(), lambda m: setattr(m.head, "fc", nn.Sequential(nn.Linear(16, 5)))
    )
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    load(save(model, tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_statistics_are_saved_as_the_subnetwork_has_them(tmp_path):
    model = cut(resnet(), **WIDTHS)
    again = load(save(model, tmp_path))
    assert torch.equal(again.bn1.running_var, model.bn1.running_var)
    assert again.bn1.num_batches_tracked == model.bn1.num_batches_tracked == 1


@pytest.mark.slow
def test_onnx_runtime_agrees_and_the_file_shrinks_by_four_bytes_a_parameter(saved, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    models = {
        "small": load(saved["SwiGLU packed"][1]),
        "whole": randomise(vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU)).eval(),
    }
    images, sizes = images_for(models["small"]), {}
    for kind, model in models.items():
        file = tmp_path / f"{kind}.onnx"
        torch.onnx.export(model, (images,), file, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), outputs(model), atol=1e-4, rtol=1e-4)
        sizes[kind] = file.stat().st_size
    counts = {kind: sum(p.numel() for p in model.parameters()) for kind, model in models.items()}
    predicted = 4 * (counts["whole"] - counts["small"])
    # Both graphs have the same nodes.
    assert sizes["whole"] - sizes["small"] == pytest.approx(predicted, rel=0.02)


# --- what is refused, before anything is written


class Mine(nn.Linear):
    pass


REFUSED = {
    "a layer of one's own": (
        lambda: with_change(vit(), lambda m: setattr(m, "head", Mine(32, 5))),
        "'head' is <class .*Mine'>, neither a plain value nor a layer of timm or torch",
    ),
    "another block": (
        lambda: with_change(vit(), lambda m: m.blocks.__setitem__(0, ParallelScalingBlock(32, 4))),
        "'blocks.0' is a ParallelScalingBlock, .*timm's vit_tiny_patch16_224 cannot become the network",
    ),
    "a layer gone": (
        lambda: with_change(vit(), lambda m: delattr(m, "head_drop")),
        "'head_drop' is missing, timm makes it a Dropout",
    ),
    "sliced blocks": (
        lambda: with_change(vit(), lambda m: setattr(m, "blocks", m.blocks[1:])),
        "'blocks.3'",
    ),
    "no blocks": (
        lambda: with_change(vit(), lambda m: setattr(m, "blocks", nn.Sequential())),
        "'blocks.0' is missing, timm makes it a Block",
    ),
    "an own forward": (
        lambda: with_change(resnet(), lambda m: setattr(m, "forward", lambda x: x)),
        "the attribute 'forward' .function. is not what timm gives it",
    ),
    "a lost buffer": (
        lambda: with_change(resnet(), lambda m: m.register_buffer("cache", torch.ones(1), persistent=False)),
        "the buffer 'cache' is not persistent",
    ),
    "a derived buffer of other values": (
        lambda: with_change(swin(), lambda m: m.layers[0].blocks[0].attn.relative_position_index.add_(1)),
        "the buffer 'layers.0.blocks.0.attn.relative_position_index' is not persistent",
    ),
    "a function as an argument": (
        lambda: vit(norm_layer=lambda width, **_: RmsNorm(width)),
        "the argument 'norm_layer' is <function",
    ),
    "layers that no network of timm has": (
        lambda: MobileNetV3(decode_arch_def([["ds_r1_k3_s1_e1_c8"], ["ir_r2_k5_s2_e3_c16_se0.25"]])),
        "timm has no MobileNetV3 of the same layers.* Make networks with timm.create_model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rebuilt_is_refused_before_anything_is_written(tmp_path, name):
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        save(make(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_subclass_is_refused_because_it_may_compute_anything(tmp_path):
    class Subclass(ResNet):
        pass

    with pytest.raises(UnsupportedError, match="Subclass cannot be saved; supported are"):
        save(Subclass(Bottleneck, **RESNET), tmp_path)


# --- damaged folders


def arguments(**changes):
    def damage(folder):
        known = description_of(folder)["network"]["arguments"]
        rewrite_network(folder, arguments={**known, **changes})

    return damage


def differences(**changes):
    def damage(folder):
        known = description_of(folder)["network"]["subnetwork"]
        rewrite_network(folder, subnetwork={**known, **changes})

    return damage


DAMAGES = {
    "an unknown name": (lambda f: rewrite_network(f, name="resnet17"), "'resnet17' is not a model of timm"),
    "a place to download from": (
        lambda f: rewrite_network(f, name="hf-hub:timm/resnet18.a1_in1k"),
        "'hf-hub:timm/resnet18.a1_in1k' is not a model of timm",
    ),
    "other weights asked for": (arguments(pretrained=True), "pretrained, .* cannot be given"),
    "a pickle asked for": (arguments(checkpoint_path="model.pth"), "checkpoint_path cannot be given"),
    "an unknown argument": (arguments(nothing=1), "TypeError: .*'nothing'"),
    "no argument": (lambda f: rewrite_network(f, arguments=MISSING), "KeyError: 'arguments'"),
    "a class of another package": (
        arguments(norm_layer={"class": "subprocess.Popen"}),
        "'subprocess.Popen' is not a layer of timm or torch",
    ),
    "no layer": (arguments(norm_layer={"class": "torch.load"}), "'torch.load' is not a layer"),
    "no list of differences": (lambda f: rewrite_network(f, subnetwork=MISSING), "KeyError: 'subnetwork'"),
    "half of that list": (lambda f: rewrite_network(f, subnetwork={"blocks": {}}), "missing 4 required"),
    "other blocks": (differences(blocks={"layer2": [0, 9]}), "IndexError"),
    "other shapes": (differences(shapes={}), r"is \(.*expected"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_says_what_is_wrong(tmp_path, name):
    damage, message = DAMAGES[name]
    folder = save(cut(resnet(), **WIDTHS), tmp_path / "folder")
    damage(folder)
    with pytest.raises(SavedFolderError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
