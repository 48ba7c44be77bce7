from __future__ import annotations

import math
from functools import partial

import pytest
import timm
import torch
from timm.layers import BlurPool2d, EcaModule, GroupNorm, SEModule
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from lightning_nas.costs import MACs, Parameters
from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet import Supernet, default_space
from lightning_nas.testing import FamilyConformance, randomise

WIDTHS = {"channels": (8, 16, 16, 24), "num_classes": 5}
VARIANTS = {
    "bottleneck": {"layers": (2, 3, 1, 1)},
    "basic": {"block": BasicBlock, "layers": (2, 2, 1, 1), "channels": (64, 16, 24, 16)},
    "D": {"layers": (1, 2, 1, 2), "stem_type": "deep", "stem_width": 8, "avg_down": True},
    "tiered stem": {"layers": (1, 1, 1, 1), "stem_type": "deep_tiered", "stem_width": 8},
    "SE": {
        "layers": (1, 2, 1, 1), "drop_path_rate": 0.2, "drop_rate": 0.1, "drop_block_rate": 0.1,
        "block_args": {"attn_layer": partial(SEModule, rd_ratio=0.25)},
    },
    "ResNeXt": {"layers": (1, 2, 1, 1), "cardinality": 4, "base_width": 32},
    "both poolings": {"layers": (1, 2, 1, 1), "global_pool": "catavgmax", "replace_stem_pool": True},
    "features": {"layers": (1, 2, 1, 1), "num_classes": 0, "global_pool": ""},
    "dilated": {"layers": (1, 2, 2, 1), "output_stride": 8, "avg_down": True},
    "two widths inside": {"layers": (1, 2, 1, 1), "block_reduce_first": 2, "down_kernel_size": 3},
}  # fmt: skip
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(variant: str = "bottleneck", **changes) -> ResNet:
    torch.manual_seed(0)
    return randomise(ResNet(**{"block": Bottleneck, **WIDTHS, **VARIANTS[variant], **changes})).eval()


@pytest.mark.parametrize("variant", VARIANTS)
class TestVariants(FamilyConformance):
    @pytest.fixture
    def network(self, variant):
        return build(variant), IMAGES

    def space(self, model):
        return default_space(model, width=(0.5, 1.0))


def test_the_choices_are_those_of_the_stages():
    space = default_space(build(), depth=(1.0, 1), width=(0.3, 1.0))
    of_two = [name for name in space.names if name.startswith(("stem", "stages.1"))]
    assert {name: space[name].values for name in of_two} == {
        "stem.width": (16, 64),
        "stages.1.depth": (1, 3),
        "stages.1.width": (16, 64),  # 19.2, in multiples of 8
        **{f"stages.1.layers.{i}.expand": (8, 16) for i in range(3)},
    }


def test_where_nothing_projects_the_stems_channels_they_are_the_first_stages_too():
    names = default_space(build("basic"), width=(0.5, 1.0)).names
    assert "stem.width" in names
    assert "stages.0.width" not in names


def test_a_network_without_a_classifier_leaves_with_all_its_channels():
    supernet = Supernet(build("features"), default_space(build("features"), width=(0.5, 1.0)))
    assert "stages.3.width" not in supernet.space.names
    with supernet.using(supernet.space.smallest), supernet.recalibrating() as model:
        assert model(IMAGES).shape[1] == 96


def test_a_head_of_the_users_own_keeps_its_inputs():
    model = build()
    model.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(96, 5))
    supernet = Supernet(model, default_space(model, width=(0.5, 1.0)))
    assert "stages.3.width" not in supernet.space.names
    with supernet.using(supernet.space.smallest), supernet.recalibrating() as model:
        assert model(IMAGES).shape == (3, 5)


def test_a_stage_shares_one_choice_where_it_is_asked_for():
    names = default_space(build(), shared=True).names
    assert "stages.1.expand" in names
    assert not any("layers" in name for name in names)


def test_what_timm_records_follows():
    supernet = Supernet(build(), default_space(build(), width=(0.5, 1.0)))
    small = supernet.skeleton(supernet.space.smallest)
    assert [info["num_chs"] for info in small.feature_info] == [32, 16, 32, 32, 48]
    assert (small.num_features, small.head_hidden_size, small.fc.in_features) == (48, 48, 48)
    assert [b.conv2.out_channels for b in small.layer2] == [8, 8]
    small.to_empty(device="cpu").reset_classifier(7)
    assert small(IMAGES).shape == (3, 7)
    assert [f.shape[1] for f in small.forward_intermediates(IMAGES, intermediates_only=True)] == [
        32, 16, 32, 32, 48,
    ]  # fmt: skip


def test_checkpointed_gradients_are_those_of_the_extracted_network():
    supernet = Supernet(build("SE", drop_path_rate=0.0, drop_rate=0.0, drop_block_rate=0.0))
    with pytest.warns(UserWarning, match="batch-norm statistics of the extracted network"):
        small = supernet.extract(supernet.space.smallest).train()
    small(IMAGES).square().sum().backward()
    model = supernet.model.train()
    model.set_grad_checkpointing()
    with supernet.using(supernet.space.smallest):
        model(IMAGES).square().sum().backward()
    gradients = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        whole = gradients[name].grad
        assert torch.equal(whole[tuple(slice(0, n) for n in parameter.shape)], parameter.grad), name
    assert gradients["layer2.1.conv1.weight"].grad is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_layer": partial(GroupNorm, num_groups=2)}, r"bn1 is a .*GroupNorm, a layer whose channels"),
        ({"aa_layer": BlurPool2d}, r"maxpool.1 is a .*BlurPool2d"),
        ({"block_args": {"attn_layer": EcaModule}}, r"layer1.0.se is a .*EcaModule.* Supported: .*SEModule"),
    ],
)
def test_what_cannot_be_sliced_is_refused_by_name(changes, message):
    model = ResNet(**{"block": Bottleneck, "layers": (1, 2, 1, 1), **WIDTHS, **changes})
    with pytest.raises(UnsupportedError, match=message):
        Supernet(model)


@pytest.mark.parametrize(("name", "layers"), [("resnet50", (3, 4, 6, 3)), ("resnet50d", (3, 4, 6, 3))])
def test_once_for_alls_space_of_a_standard_network_has_two_ratios_and_two_blocks_at_least(name, layers):
    with torch.device("meta"):
        space = default_space(timm.create_model(name), "ofa")
    of_stages = [sum(2**depth for depth in range(max(2, n - 2), n + 1)) for n in layers]
    assert space.size == math.prod(of_stages) * 3**5
    assert space["stages.1.layers.0.expand"].values == (104, 128)  # 0.2 and 0.25 of 512, in eights
    assert space["stages.1.width"].values == (336, 408, 512)
    assert space["stem.width"].values == (40, 48, 64)


def test_once_for_alls_space_is_whole_on_a_network_of_its_shape():
    with torch.device("meta"):
        space = default_space(ResNet(Bottleneck, (4, 4, 6, 4), base_width=90), "ofa")
    of_stages = [sum(3**depth for depth in range(n - 2, n + 1)) for n in (4, 4, 6, 4)]
    assert sum(name.endswith("expand") for name in space.names) == 18
    assert space.size == math.prod(of_stages) * 3**5
    assert space["stages.0.layers.0.expand"].values == (48, 64, 90)
    assert space["stages.2.depth"].kept(4) == (0, 1, 2, 3)


def test_costs_of_the_whole_network_are_the_published_ones():
    with torch.device("meta"):
        supernet = Supernet(timm.create_model("resnet50"))
    macs = MACs(supernet, torch.zeros(1, 3, 224, 224))(supernet.space.largest)
    assert Parameters(supernet)(supernet.space.largest) == 25_557_032  # as torchvision lists them
    assert round(macs / 1e9, 3) == 4.089
