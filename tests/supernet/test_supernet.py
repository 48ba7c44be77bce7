from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from lightning_nas.errors import NASError, NoMatchError, UnsupportedError
from lightning_nas.space import Choice, Depth, SearchSpace
from lightning_nas.supernet import Anatomy, Stage, Supernet, default_space, supports
from lightning_nas.supernet.spaces import relative_space
from lightning_nas.testing import randomise

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


def tiny(depth=4, **settings):
    return randomise(
        VisionTransformer(
            img_size=16, patch_size=4, num_classes=5, embed_dim=32, depth=depth, num_heads=4, **settings
        )
    ).eval()


# --- activating


def test_a_refused_architecture_is_explained_and_changes_nothing():
    model = tiny()
    supernet = Supernet(model)
    small = supernet.space.smallest
    supernet.activate(small)
    before = model(IMAGES)
    with pytest.raises(ValueError, match=r"'layers.0.heads' cannot be 7; allowed are \(1, 2, 3, 4\)"):
        supernet.activate({**supernet.space.largest, "layers.0.heads": 7})
    with pytest.raises(ValueError, match=r"unknown choice 'layers.0.head'. Did you mean 'layers.0.heads'"):
        supernet.activate({**supernet.space.largest, "layers.0.head": 1})
    assert supernet.active == small
    assert torch.equal(model(IMAGES), before)


def test_architectures_that_are_the_same_network_are_active_in_one_form():
    supernet = Supernet(tiny(), SearchSpace([Choice("depth", (2, 4)), Choice("layers.3.mlp", (64, 128))]))
    supernet.activate({"depth": 2, "layers.3.mlp": 64})
    assert supernet.active["layers.3.mlp"] == 128


def test_the_previous_subnetwork_runs_again_after_an_exception():
    model = tiny()
    supernet = Supernet(model)
    before = model(IMAGES)
    with pytest.raises(RuntimeError, match=r"boom"), supernet.using(supernet.space.smallest):
        raise RuntimeError("boom")
    assert supernet.active == supernet.space.largest
    assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("is_fused", [True, False])
def test_one_adam_step_equals_that_of_a_network_written_by_hand_with_slices(is_fused):
    model = tiny(depth=3)
    for block in model.blocks:
        block.attn.fused_attn = is_fused
    space = SearchSpace(
        [
            Depth("depth", (2, 3), keeps=((0, 2), (0, 1, 2))),
            *(Choice(f"layers.{i}.heads", (1, 3, 4)) for i in range(3)),
            *(Choice(f"layers.{i}.mlp", (40, 128)) for i in range(3)),
        ]
    )
    by_hand = copy.deepcopy(model)
    supernet = Supernet(model, space)
    architecture = space.architecture(
        {"depth": 2, "layers.0.heads": 3, "layers.2.heads": 1, "layers.2.mlp": 40}
    )

    def attention(x, attn, k):
        rows = torch.cat([torch.arange(k) + piece * 32 for piece in range(3)])
        qkv = F.linear(x, attn.qkv.weight[rows], attn.qkv.bias[rows])
        q, k_, v = qkv.reshape(4, 17, 3, k // 8, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if is_fused:
            x = F.scaled_dot_product_attention(q, k_, v)
        else:
            x = ((q * 8**-0.5) @ k_.transpose(-2, -1)).softmax(-1) @ v
        return F.linear(x.transpose(1, 2).reshape(4, 17, k), attn.proj.weight[:, :k], attn.proj.bias)

    def mlp(x, layers, m):
        hidden = F.gelu(F.linear(x, layers.fc1.weight[:m], layers.fc1.bias[:m]))
        return F.linear(hidden, layers.fc2.weight[:, :m], layers.fc2.bias)

    def network(x):
        x = by_hand.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([by_hand.cls_token.expand(4, -1, -1), x], 1) + by_hand.pos_embed
        for i, k, m in ((0, 24, 128), (2, 8, 40)):
            block = by_hand.blocks[i]
            x = x + attention(block.norm1(x), block.attn, k)
            x = x + mlp(block.norm2(x), block.mlp, m)
        return by_hand.head(by_hand.norm(x)[:, 0])

    results = []
    for own, call in ((model, model), (by_hand, network)):
        optimizer = torch.optim.Adam(own.parameters(), lr=1e-2)
        with supernet.using(architecture):
            output = call(IMAGES)
            F.cross_entropy(output, LABELS).backward()
        optimizer.step()
        results.append((output, own))
    assert torch.equal(results[0][0], results[1][0])
    for (name, parameter), other in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name
        assert torch.equal(parameter, other), name


def test_what_a_subnetwork_leaves_out_gets_no_gradient_from_it():
    model = tiny()
    supernet = Supernet(model)
    with supernet.using(supernet.space.smallest):  # one head of 8, a quarter of 128 units, 3 of 4 blocks
        model(IMAGES).square().sum().backward()
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    rows = attn.qkv._parameters["weight"].grad.view(3, 4, 8, 32).abs().sum((0, 2, 3))
    assert rows[0] > 0
    assert torch.equal(rows[1:], torch.zeros(3))
    units = mlp.fc2._parameters["weight"].grad.abs().sum(0)
    assert bool((units[:32] > 0).all())
    assert torch.equal(units[32:], torch.zeros(96))
    dropped = [block for i, block in enumerate(model.blocks) if i not in supernet.space["depth"].kept(3)]
    assert [parameter.grad for parameter in dropped[0].parameters()] == [None] * 12


def test_a_network_without_a_space_for_a_layer_keeps_the_class_of_that_layer():
    model = tiny()
    Supernet(model, SearchSpace([Choice("layers.1.mlp", (64, 128))]))
    changed = [name for name, module in model.named_modules() if "Elastic" in type(module).__name__]
    assert changed == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]


# --- extracting


def test_an_extracted_network_keeps_mode_freezing_precision_and_rates():
    model = tiny(drop_path_rate=0.3, init_values=0.1).to(torch.bfloat16).train()
    model.blocks[0].requires_grad_(False)
    model.blocks[3].eval()
    space = SearchSpace(
        [Depth("depth", (2, 4), keeps=((0, 3), (0, 1, 2, 3))), Choice("layers.0.mlp", (32, 128))]
    )
    supernet = Supernet(model, space)
    small = supernet.extract(supernet.space.smallest)
    assert small.training
    assert small.blocks.training
    assert [block.training for block in small.blocks] == [True, False]
    assert [block.mlp.fc1.weight.requires_grad for block in small.blocks] == [False, True]
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert small.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)  # that of block 3, not of block 1


def test_an_extracted_network_states_its_own_sizes():
    model = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=3)
    supernet = Supernet(model, default_space(model, embed=(0.5, 1.0)))
    small = supernet.extract(supernet.space.smallest)
    assert (len(small.blocks), small.embed_dim, small.num_features, small.head_hidden_size) == (3, 96, 96, 96)
    attn, mlp = small.blocks[2].attn, small.blocks[2].mlp
    assert (attn.num_heads, attn.head_dim, attn.attn_dim, attn.scale) == (1, 64, 64, 64**-0.5)
    assert (attn.qkv.in_features, attn.qkv.out_features) == (96, 192)
    assert (attn.proj.in_features, attn.proj.out_features) == (64, 96)
    assert (mlp.fc1.out_features, mlp.fc2.in_features) == (192, 192)
    assert small.norm.normalized_shape == (96,)
    assert small.patch_embed.proj.out_channels == 96
    assert [info["module"] for info in small.feature_info] == ["blocks.0", "blocks.1", "blocks.2"]
    assert {info["num_chs"] for info in small.feature_info} == {96}
    assert [name for name in small.state_dict() if name.startswith("blocks.3")] == []


def test_features_of_an_extracted_network_are_those_of_the_active_blocks():
    model = tiny()
    supernet = Supernet(model)
    architecture = supernet.space.smallest
    small = supernet.extract(architecture)
    with supernet.using(architecture):
        features, (_, *intermediates) = model.forward_intermediates(IMAGES, indices=[0, 1, 3])
    kept = supernet.space["depth"].kept(3)
    small_features, small_intermediates = small.forward_intermediates(IMAGES)
    assert kept == (0, 1, 3)
    assert torch.equal(small.forward_features(IMAGES), features)
    assert torch.equal(small_features, features)
    assert torch.equal(small_intermediates[-1], intermediates[-1])


def test_hooks_of_the_user_stay_with_his_network():
    model = tiny()
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append("hook"))
    supernet = Supernet(model)
    small = supernet.extract(supernet.space.smallest)
    small(IMAGES)
    assert calls == []
    model(IMAGES)
    assert calls == ["hook"]


@pytest.mark.parametrize("settings", [{}, {"reg_tokens": 2, "init_values": 0.1}, {"global_pool": "avg"}])
def test_an_extracted_network_survives_export(settings, tmp_path):
    supernet = Supernet(tiny(depth=2, **settings))
    small = supernet.extract(supernet.space.smallest)
    torch.export.save(torch.export.export(small, (IMAGES,)), tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    assert torch.equal(loaded(IMAGES), small(IMAGES))


def test_a_learner_can_train_what_was_extracted_without_touching_the_supernet():
    model = tiny()
    supernet = Supernet(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = supernet.extract(supernet.space.smallest)
    small(IMAGES).sum().backward()
    torch.optim.SGD(small.parameters(), lr=1.0).step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- living with others


def test_a_network_has_one_supernet_at_a_time():
    model = tiny()
    supernet = Supernet(model)
    with pytest.raises(NASError, match=r"already has a supernet.*release\(\) first"):
        Supernet(model)
    with pytest.raises(NASError, match=r"copy of one that has"):
        Supernet(copy.deepcopy(model))
    supernet.release()
    supernet.release()
    with pytest.raises(NASError, match=r"was released; make a new one"):
        supernet.activate(supernet.space.smallest)
    assert Supernet(model).active == supernet.space.largest


def test_inside_paused_the_network_is_the_users_own():
    model = tiny()
    supernet = Supernet(model)
    supernet.activate(supernet.space.smallest)
    small = model(IMAGES)
    with supernet.paused():
        assert {type(module).__module__.partition(".")[0] for module in model.modules()} == {"timm", "torch"}
        assert not any("Elastic" in type(module).__name__ for module in model.modules())
        assert model.blocks[0].attn.num_heads == 4
    assert torch.equal(model(IMAGES), small)
    with pytest.raises(RuntimeError, match=r"boom"), supernet.paused():
        raise RuntimeError("boom")
    assert torch.equal(model(IMAGES), small)


@pytest.mark.parametrize("execution", ["slice", "mask"])
def test_a_pickled_supernet_comes_back_as_one_of_its_own(execution):
    model = tiny()
    whole, supernet = model(IMAGES), Supernet(model, execution=execution)
    supernet.activate(supernet.space.smallest)
    small = model(IMAGES)
    again = pickle.loads(pickle.dumps(supernet))
    assert again.active == supernet.space.smallest
    assert torch.equal(again.model(IMAGES), small)
    again.activate(again.space.largest)
    assert torch.equal(again.model(IMAGES), whole)
    assert torch.equal(model(IMAGES), small)
    again.release()
    assert type(again.model.blocks[1]) is Block


@pytest.mark.slow
def test_an_elastic_network_saved_whole_runs_its_subnetwork_in_a_fresh_process(tmp_path):
    for execution in ("slice", "mask"):
        supernet = Supernet(tiny(), execution=execution)
        supernet.activate(supernet.space.smallest)
        torch.save((supernet.model, IMAGES, supernet.model(IMAGES)), tmp_path / execution)
    code = """if True:
        import torch
        torch.set_num_threads(1)
        for execution in ("slice", "mask"):
            model, images, expected = torch.load(execution, weights_only=False)
            assert torch.equal(model(images), expected), execution
    """
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("execution", ["slice", "mask"])
def test_a_copy_runs_the_subnetwork_it_was_copied_with(execution):
    model = tiny()
    supernet = Supernet(model, execution=execution)
    with supernet.using(supernet.space.smallest):
        small = model(IMAGES)
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    assert not torch.equal(model(IMAGES), small)
    assert torch.equal(averaged(IMAGES), small)
    assert list(averaged.module.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("execution", ["slice", "mask"])
def test_a_supernet_follows_its_network_to_another_precision_and_device(execution):
    model = tiny()
    supernet = Supernet(model, execution=execution)
    supernet.activate(supernet.space.smallest)
    model.to(torch.float64)
    extracted = supernet.extract(supernet.space.smallest)
    torch.testing.assert_close(model(IMAGES.double()), extracted(IMAGES.double()), rtol=1e-12, atol=1e-12)
    model.to("meta")
    assert model(IMAGES.double().to("meta")).device.type == "meta"


@pytest.mark.parametrize(("execution", "graphs"), [("slice", 2), ("mask", 1)])
def test_a_compiled_network_follows_and_masking_needs_one_graph(execution, graphs):
    torch.compiler.reset()
    compiled_graphs = []

    def backend(graph, _):
        compiled_graphs.append(graph)
        return graph

    model = tiny(depth=3)
    supernet = Supernet(model, execution=execution)
    compiled = torch.compile(model, backend=backend)
    for architecture in (supernet.space.largest, supernet.space.smallest):
        with supernet.using(architecture):
            output = compiled(IMAGES)
        torch.testing.assert_close(output, supernet.extract(architecture)(IMAGES), rtol=1e-5, atol=1e-5)
    assert len(compiled_graphs) == graphs


def test_a_network_compiled_before_is_followed_too():
    model = tiny()
    before = model(IMAGES)
    supernet = Supernet(torch.compile(model, backend="eager"))
    assert supernet.model is model
    with supernet.using(supernet.space.smallest):
        assert not torch.allclose(model(IMAGES), before)


def test_checkpoints_are_those_of_the_plain_network():
    model, other = tiny(), tiny()
    randomise(other, seed=1)
    expected = other(IMAGES)
    supernet = Supernet(model, execution="mask")
    supernet.activate(supernet.space.smallest)
    model.load_state_dict(other.state_dict())
    supernet.activate(supernet.space.largest)
    assert torch.equal(model(IMAGES), expected)


# --- spaces


def test_the_default_space_is_relative_to_each_block():
    space = default_space(tiny(depth=6))
    assert space["depth"].values == (4, 5, 6)
    assert [space["depth"].kept(d) for d in (4, 5, 6)] == [(0, 1, 3, 5), (0, 1, 2, 4, 5), (0, 1, 2, 3, 4, 5)]
    assert space["layers.5.heads"].values == (1, 2, 3, 4)
    assert space["layers.5.mlp"].values == (32, 64, 96, 128)
    assert space["layers.2.mlp"].conditions == (("depth", (5, 6)),)
    assert space["layers.0.mlp"].conditions == ()


def test_heads_are_rounded_to_whole_ones_without_repetition():
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=2)
    assert default_space(model)["layers.0.heads"].values == (1, 2, 3)


def test_presets_are_the_papers_and_only_for_their_network():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert default_space(model, "instatune").size == 12**11 + 12**12
    assert default_space(model, "dynast").size == 9_721_026_183_168
    with pytest.raises(ValueError, match=r"'instatune' is for a network with depth 12, heads 12, mlp 3072;"):
        Supernet(tiny(), "instatune")
    with pytest.raises(ValueError, match=r"Unknown space 'instatun'. Did you mean 'instatune'"):
        Supernet(tiny(), "instatun")


def test_options_are_shares_or_whole_numbers():
    space = default_space(
        tiny(), heads=(2, 4), mlp=(0.5, 1.0), depth=(0.5, 4), keep={2: (0, 2), 4: (0, 1, 2, 3)}
    )
    assert space["layers.0.heads"].values == (2, 4)
    assert space["layers.0.mlp"].values == (64, 128)
    assert space["depth"].kept(2) == (0, 2)
    assert default_space(tiny(), shared=True).names == ("depth", "heads", "mlp")
    with pytest.raises(
        ValueError, match=r"mlp cannot be 1.5; give a float in \(0, 1\] for a share, or an int"
    ):
        default_space(tiny(), mlp=(0.5, 1.5))
    with pytest.raises(ValueError, match=r"depth cannot be 5; .* an int from 1 to 4"):
        default_space(tiny(), depth=(2, 5))


@pytest.mark.parametrize("fixed", [(), (0,), (0, 3), (1, 2, 3, 5)])
def test_blocks_that_must_always_run_are_in_every_depth_that_is_spread(fixed):
    stage = Stage("depth", tuple(f"blocks.{i}" for i in range(6)), fixed)
    anatomy = Anatomy((stage,), {}, (), ())
    fewest = len({0, *fixed})
    depth = relative_space(anatomy, depth=range(fewest, 7))["depth"]
    for value in depth.values:
        assert len(depth.kept(value)) == value
        assert {0, *fixed} <= set(depth.kept(value))
    assert relative_space(anatomy)["depth"].values[0] == max(4, fewest)
    if fewest > 1:
        with pytest.raises(ValueError, match=rf"depth cannot be 1: {fewest} blocks must always run"):
            relative_space(anatomy, depth=(1, 6))


def test_a_block_that_no_depth_keeps_has_no_choices():
    names = default_space(tiny(), depth=(1, 2), keep={1: (0,), 2: (0, 3)}).names
    assert names == ("depth", "layers.0.heads", "layers.0.mlp", "layers.3.heads", "layers.3.mlp")


def test_a_shared_choice_decides_for_every_block():
    supernet = Supernet(tiny(), default_space(tiny(), shared=True))
    small = supernet.extract(supernet.space.smallest)
    assert [block.attn.num_heads for block in small.blocks] == [1, 1, 1]
    assert [block.mlp.fc1.out_features for block in small.blocks] == [32, 32, 32]


def test_a_plain_depth_keeps_the_first_blocks_and_conditions_are_completed():
    model = tiny()
    space = SearchSpace([Choice("depth", (1, 4)), *(Choice(f"layers.{i}.mlp", (64, 128)) for i in range(4))])
    supernet = Supernet(model, space)
    assert supernet.space.size == 2 + 2**4
    small = supernet.extract(supernet.space.smallest)
    assert len(small.blocks) == 1
    assert torch.equal(small.blocks[0].norm1.weight, model.blocks[0].norm1.weight)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("layers.0.heads", (2, 5)), "'layers.0.heads' cannot be 5, only an integer from 1 to 4"),
        (Choice("layers.0.mlp", (0, 128)), "'layers.0.mlp' cannot be 0, only an integer from 1 to 128"),
        (Choice("layers.0.mlp", (0.5, 1.0)), "'layers.0.mlp' cannot be 0.5"),
        (Choice("layers.9.mlp", (64,)), "no choice 'layers.9.mlp' in it. Did you mean 'layers.[0-3].mlp'"),
        (Choice("depth", (5,)), "'depth' cannot be 5, only an integer from 1 to 4"),
        (
            Depth("depth", (1,), keeps=((7,),)),
            "'depth' 1 keeps block 7, but the last one of the network is 3",
        ),
    ],
)
def test_a_space_beyond_the_network_is_refused_before_any_change(choice, message):
    model = tiny()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        Supernet(model, SearchSpace([choice, Choice("layers.1.heads", (1, 4))]))
    assert [type(module) for module in model.modules()] == classes


def test_all_faults_of_a_space_come_in_one_message():
    space = SearchSpace([Choice("layers.0.heads", (8,)), Choice("width", (8,))])
    with pytest.raises(ValueError, match=r"cannot be 8.*no choice 'width'"):
        Supernet(tiny(), space)


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("blocks.0.*", {"layers.0.heads", "layers.0.mlp"}),
        ("blocks.3.mlp", {"layers.3.mlp"}),
        ("blocks.*.attn", {f"layers.{i}.heads" for i in range(4)}),
        ("depth", {"depth"}),
    ],
)
def test_excluded_layers_stay_whole(pattern, left):
    model = tiny()
    whole = set(default_space(model).names)
    supernet = Supernet(model, exclude=[pattern])
    assert whole - set(supernet.space.names) == left
    assert Supernet(tiny(), exclude=pattern).space == supernet.space
    small = supernet.extract(supernet.space.smallest)
    assert small.blocks[0].attn.num_heads == (4 if "layers.0.heads" in left else 1)


def test_a_pattern_that_excludes_nothing_is_named_with_the_nearest():
    with pytest.raises(
        NoMatchError, match=r"'blocks.0.mpl' matches no elastic module. Did you mean 'blocks.0.mlp'"
    ):
        Supernet(tiny(), exclude=["blocks.0.mpl"])


# --- what is not supported


def test_an_unknown_network_is_refused_and_the_nearest_named():
    model = timm.create_model("vit_relpos_small_patch16_224", depth=1)
    assert not supports(model)
    with pytest.raises(
        UnsupportedError, match=r"VisionTransformerRelPos is not.*Did you mean 'VisionTransformer"
    ):
        Supernet(model)
    with pytest.raises(UnsupportedError, match=r"Linear is not a supported network"):
        Supernet(nn.Linear(2, 2))


def test_a_layer_inside_that_cannot_be_sliced_is_named():
    with pytest.raises(UnsupportedError, match=r"blocks.0.attn is a .*DiffAttention.*Supported: Attention\."):
        Supernet(VisionTransformer(embed_dim=32, num_heads=2, depth=1, attn_layer="diff"))

    class LowRank(nn.Linear):
        pass

    model = tiny()
    model.blocks[1].mlp.fc1 = LowRank(32, 128)
    with pytest.raises(UnsupportedError, match=r"blocks.1.mlp.fc1 is a .*LowRank.*Supported: Linear\."):
        Supernet(model)


def test_shared_weights_are_refused_by_name():
    model = tiny()
    model.blocks[2].mlp.fc1.weight = model.blocks[1].mlp.fc1.weight
    with pytest.raises(UnsupportedError, match=r"blocks.1.mlp.fc1.weight and blocks.2.mlp.fc1.weight are"):
        Supernet(model)


def test_a_subclass_written_by_the_user_is_extracted_as_one():
    class Mine(VisionTransformer):
        def forward(self, images, scale=2.0):
            return super().forward(images) * scale

    model = randomise(
        Mine(img_size=16, patch_size=4, num_classes=5, embed_dim=32, depth=3, num_heads=4)
    ).eval()
    supernet = Supernet(model)
    small = supernet.extract(supernet.space.smallest)
    with supernet.using(supernet.space.smallest):
        assert torch.equal(small(IMAGES, scale=3.0), model(IMAGES, scale=3.0))
    assert type(small) is Mine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "random"}, "order must be 'importance', 'magnitude' or None, got 'random'"),
        ({"order": "importance"}, "order='importance' and calibration=batches belong together"),
        ({"calibration": []}, "order='importance' and calibration=batches belong together"),
        ({"execution": "sparse"}, "execution must be 'slice' or 'mask', got 'sparse'"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Supernet(tiny(), **arguments)


# --- several subnetworks in one pass


@pytest.mark.parametrize("embed", [None, (0.5, 1.0)])
def test_each_part_of_a_mixture_computes_what_its_subnetwork_does_alone(embed):
    model = tiny().double()
    supernet = Supernet(model, default_space(model, embed=embed))
    rng = np.random.default_rng(0)
    members = [supernet.space.sample(rng), supernet.space.smallest]
    images = IMAGES.double()
    with supernet.mixture(members):
        mixed = model(images)
        F.cross_entropy(mixed, LABELS).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for member, part in zip(members, (slice(0, 2), slice(2, 4)), strict=True):
        alone = supernet.extract(member)
        torch.testing.assert_close(mixed[part], alone(images[part]), rtol=1e-10, atol=1e-10)
        with supernet.using(member):
            (F.cross_entropy(model(images[part]), LABELS[part]) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_after_a_mixture_the_supernet_is_what_it_was():
    model = tiny()
    supernet = Supernet(model)
    supernet.activate(supernet.space.smallest)
    before = model(IMAGES)
    thirds = [supernet.space.largest] * 3
    with pytest.raises(ValueError, match=r"4 rows cannot be split into 3"), supernet.mixture(thirds):
        model(IMAGES)
    assert torch.equal(model(IMAGES), before)
    with pytest.raises(ValueError, match=r"at least one architecture"), supernet.mixture([]):
        pass
