from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn
from torch.nn import functional as F

from lightning_nas.costs import MACs, Parameters
from lightning_nas.errors import NASError, UnsupportedError
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.supernet import Supernet, add_kernel_transforms, default_space
from lightning_nas.testing import FamilyConformance, randomise

SE_FROM_INPUT = partial(SqueezeExcite, rd_ratio=0.25)
MOBILE = [
    ["ds_r1_k3_s1_e1_c8"],
    ["ir_r2_k5_s2_e3_c16_se0.25_nre"],
    ["ir_r3_k7_s1_e2_c24"],
    ["cn_r1_k1_s1_c32"],
]
VARIANTS = {
    "MobileNetV3": {"arch": MOBILE, "stem_size": 8, "drop_path_rate": 0.2},
    "MobileNetV3, padded on one side": {"arch": MOBILE, "stem_size": 16, "pad_type": "same"},
    "MobileNetV3 with a norm in its head": {"arch": MOBILE, "head_norm": True, "global_pool": "avgmax"},
    "features": {"arch": MOBILE, "num_classes": 0},
    "EfficientNet": {
        "make": EfficientNet,
        "arch": [["ds_r2_k5_s1_e1_c8_se0.25"], ["ir_r2_k5_s2_e2_c16_se0.25"], ["ir_r2_k3_s1_e4_c16_noskip"]],
        "se_layer": SE_FROM_INPUT, "act_layer": nn.SiLU, "drop_rate": 0.2,
    },
    "EfficientNetV2": {
        "make": EfficientNet,
        "arch": [["cn_r2_k3_s1_e1_c16_skip"], ["er_r2_k3_s2_e2_c24"], ["ir_r2_k3_s2_e2_c32_se0.25"]],
        "pad_type": "same", "stem_size": 16,
    },
    "without a last convolution": {
        "make": EfficientNet, "arch": [["ir_r2_k5_s2_e3_c16"]], "num_features": 0, "global_pool": "catavgmax",
    },
}  # fmt: skip
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(variant: str = "MobileNetV3", **changes) -> nn.Module:
    settings = {"num_features": 40, "num_classes": 5, "stem_size": 8, **VARIANTS[variant], **changes}
    make = settings.pop("make", MobileNetV3)
    torch.manual_seed(0)
    model = make(decode_arch_def(settings.pop("arch")), round_chs_fn=partial(round_channels), **settings)
    return randomise(model).eval()


def once_for_all(**changes) -> nn.Module:
    """Once-for-All's largest MobileNetV3 [Cai et al., 2020]: kernels of 7, ratios of 6, 4 blocks a stage."""
    stages = [f"ir_r4_k7_s{s}_e6_c{c}{se}" for s, c, se in (
        (2, 24, ""), (2, 40, "_se0.25"), (2, 80, ""), (1, 112, "_se0.25"), (2, 160, "_se0.25"),
    )]  # fmt: skip
    stages = changes.get("stages", stages)
    with torch.device("meta"):
        arch = decode_arch_def([["ds_r1_k3_s1_e1_c16"], *([stage] for stage in stages), ["cn_r1_k1_s1_c960"]])
        return MobileNetV3(arch, round_chs_fn=partial(round_channels))


@pytest.mark.parametrize("variant", VARIANTS)
class TestVariants(FamilyConformance):
    @pytest.fixture
    def network(self, variant):
        return build(variant), IMAGES

    def space(self, model):
        return default_space(model, width=(0.5, 1.0))


class TestTransformedKernels(FamilyConformance):
    @pytest.fixture
    def network(self):
        return randomise(add_kernel_transforms(build())).eval(), IMAGES


def test_once_for_alls_space_has_its_published_size():
    assert default_space(once_for_all(), "ofa-mobilenetv3").size == 21_758_655_492_572_485_851


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["ir_r3_k7_s2_e6_c24"] * 5, r"with stages.1.depth 4, .*; this one has stages.1.depth 3"),
        (["ir_r4_k5_s2_e6_c24"] * 5, r"this one has .*stages.1.kernel 5"),
        (["ir_r4_k7_s2_e4_c24"] * 5, r"6 times the channels inside; blocks.1.0 is none"),
    ],
)
def test_once_for_alls_space_is_refused_for_another_network(stages, message):
    with pytest.raises(ValueError, match=message):
        default_space(once_for_all(stages=stages), "ofa-mobilenetv3")


@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [("mobilenetv3_large_100", 5_483_032, 0.217), ("efficientnet_b0", 5_288_548, 0.386)],
)
def test_costs_of_the_whole_network_are_the_published_ones(name, parameters, giga):
    with torch.device("meta"):
        supernet = Supernet(timm.create_model(name))
    macs = MACs(supernet, torch.zeros(1, 3, 224, 224))(supernet.space.largest)
    assert Parameters(supernet)(supernet.space.largest) == parameters  # as torchvision lists them
    assert macs / 1e9 == pytest.approx(giga, rel=0.005)  # which counts additions of biases too


def test_the_choices_are_those_of_the_stages():
    space = default_space(build(), expand=(0.5, 1.0), depth=None, width=(0.5, 1.0))
    assert {name: space[name].values for name in space.names} == {
        "stages.2.depth": (2, 3),
        "stages.1.layers.0.expand": (16, 24), "stages.1.layers.0.kernel": (3, 5),
        "stages.1.layers.1.expand": (24, 48), "stages.1.layers.1.kernel": (3, 5),
        "stages.2.layers.0.expand": (16, 32), "stages.2.layers.0.kernel": (3, 5, 7),
        "stages.2.layers.1.expand": (24, 48), "stages.2.layers.1.kernel": (3, 5, 7),
        "stages.2.layers.2.expand": (24, 48), "stages.2.layers.2.kernel": (3, 5, 7),
        "stages.1.width": (8, 16), "stages.2.width": (16, 24), "stages.3.width": (16, 32),
    }  # fmt: skip


def test_blocks_of_a_stage_share_a_choice_only_where_they_are_alike():
    names = default_space(build(), shared=True).names
    assert {name for name in names if name.startswith("stages.2") and "depth" not in name} == {
        "stages.2.layers.0.expand",  # 32 channels, where the others have 48
        "stages.2.expand",
        "stages.2.kernel",
    }


def test_a_block_that_adds_to_nothing_is_never_dropped():
    names = default_space(build("EfficientNet"), width=(0.5, 1.0)).names
    assert "stages.2.depth" not in names
    assert {"stages.2.width", "stages.2.layers.1.width"} <= set(names)
    with pytest.raises(ValueError, match="depth cannot be 1: 2 blocks must always run"):
        default_space(build("EfficientNet"), depth=(1, 2))


def test_hidden_channels_are_ranked_by_the_weights_of_the_projection():
    supernet = Supernet(build())
    expected = supernet.model.blocks[1][0].conv_pwl.weight.detach().abs().sum((0, 2, 3))
    torch.testing.assert_close(supernet.magnitude()["stages.1.layers.0.expand"], expected)


def test_what_timm_records_follows():
    supernet = Supernet(build(), default_space(build(), width=(0.5, 1.0)))
    small = supernet.skeleton(supernet.space.smallest)
    depthwise = small.blocks[2][0].conv_dw
    assert (small.num_features, small.conv_head.in_channels, small.head_hidden_size) == (16, 16, 40)
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (8, 8, 8)
    assert (depthwise.kernel_size, depthwise.padding) == ((3, 3), (1, 1))
    assert small.blocks[1][0].se.conv_reduce.in_channels == 8
    small.to_empty(device="cpu")
    taps = small.forward_intermediates(IMAGES, intermediates_only=True)
    assert [info["num_chs"] for info in small.feature_info] == [tap.shape[1] for tap in taps] == [8, 16]


# --- kernels


@pytest.mark.parametrize("pad", ["", "same"])
def test_a_smaller_kernel_is_the_centre_of_the_whole_one(pad):
    model = build(pad_type=pad)
    supernet = Supernet(model, SearchSpace([Choice("stages.2.layers.1.kernel", (3, 7))]))
    layer = supernet.model.blocks[2][1].conv_dw
    features = torch.randn(2, 48, 9, 9)
    outside = layer.weight.detach().clone()
    outside[..., 2:5, 2:5] = 0  # of the 7 x 7
    whole = layer(features)
    with supernet.using({"stages.2.layers.1.kernel": 3}):
        torch.testing.assert_close(layer(features), whole - F.conv2d(features, outside, padding=3, groups=48))


@pytest.mark.parametrize("size", [4, 6, 8])
def test_a_kernel_without_a_centre_is_refused(size):
    with pytest.raises(ValueError, match=rf"'stages.2.layers.1.kernel' cannot be {size}"):
        Supernet(build(), SearchSpace([Choice("stages.2.layers.1.kernel", (size,))]))


def test_identity_matrices_give_the_plain_centre():
    plain, changed = Supernet(build()), Supernet(add_kernel_transforms(build()))
    for architecture in (plain.space.largest, plain.space.smallest):
        for supernet in (plain, changed):
            supernet.activate(architecture)
            if supernet.is_stale:
                supernet.recalibrate([IMAGES], samples=1)
        assert torch.equal(plain.model(IMAGES), changed.model(IMAGES))


def test_transformed_kernels_are_matrix_times_centre_in_two_steps():
    supernet = Supernet(randomise(add_kernel_transforms(build())).double())
    layer = supernet.model.blocks[2][1].conv_dw
    to5, to3 = layer.kernel_7to5.detach().numpy(), layer.kernel_5to3.detach().numpy()
    three = np.zeros((48, 3, 3))
    for channel, kernel in enumerate(layer.weight.detach().numpy()[:, 0]):
        five = (to5 @ kernel[1:6, 1:6].reshape(25)).reshape(5, 5)
        three[channel] = (to3 @ five[1:4, 1:4].reshape(9)).reshape(3, 3)
    supernet.activate({**supernet.space.largest, "stages.2.layers.1.kernel": 3})
    np.testing.assert_allclose(layer.weight.detach().numpy()[:, 0], three, rtol=1e-12)


def test_matrices_are_trained_and_baked_into_a_plain_kernel():
    before = set(build().state_dict())
    model = add_kernel_transforms(add_kernel_transforms(build()))
    supernet = Supernet(model)
    added = set(model.state_dict()) - before
    assert added == {
        *(f"blocks.1.{i}.conv_dw.kernel_5to3" for i in range(2)),
        *(f"blocks.2.{i}.conv_dw.kernel_{step}" for i in range(3) for step in ("7to5", "5to3")),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with supernet.using(supernet.space.smallest):
        model.train()(IMAGES).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[1][0].conv_dw.kernel_5to3, torch.eye(9))
    for architecture in (supernet.space.largest, supernet.space.smallest):
        names = set(supernet.skeleton(architecture).state_dict())
        assert not any("kernel_" in name for name in names)
        assert names <= before
    supernet.release()
    assert set(model.state_dict()) == before | added


def test_matrices_are_refused_where_they_come_too_late_or_have_nothing_to_do():
    supernet = Supernet(build())
    with pytest.raises(NASError, match="has a supernet already"):
        add_kernel_transforms(supernet.model)
    with pytest.raises(UnsupportedError, match="no kernel of this ResNet is elastic"):
        add_kernel_transforms(timm.create_model("resnet18"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mixnet_s",
            r"is a .*MixedConv2d, a convolution that cannot be sliced. Supported: Conv2d, Conv2dSame",
        ),
        ("mobilenetv4_conv_small", r"is a .*UniversalInvertedResidual, a block .*: InvertedResidual"),
        ("efficientnet_cc_b0_4e", r"is a .*CondConv"),
    ],
)
def test_what_cannot_be_sliced_is_refused_by_name(name, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedError, match=message):
        Supernet(model)


def test_a_convolution_of_groups_that_do_not_follow_the_channels_is_refused():
    model = build("EfficientNetV2")
    model.blocks[1][0].conv_exp = nn.Conv2d(16, 32, 3, 2, 1, groups=16, bias=False)
    with pytest.raises(UnsupportedError, match=r"blocks.1.0.conv_exp convolves in 16 groups of 1 channels"):
        Supernet(model)
