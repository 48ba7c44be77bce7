from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel
from transformers.models.vit.modeling_vit import ViTAttention

from lightning_nas.costs import MACs
from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet import Supernet, default_space
from tests.supernet.families.towers import IMAGE, SIZES, TowerConformance, built, drawn

IMAGES = {"pixel_values": drawn(2, 3, 16, 16)}
LABELS = {"labels": torch.tensor([0, 4])}
HIDDEN = {"bool_masked_pos": torch.arange(32).view(2, 16) % 3 == 0}
LARGER = {"pixel_values": drawn(2, 3, 24, 24), "interpolate_pos_encoding": True}
VARIANTS = {
    "classification": (ViTForImageClassification, {"num_labels": 5}, IMAGES | LABELS),
    "features": (ViTModel, {}, IMAGES),
    "masked patches": (ViTForMaskedImageModeling, {"encoder_stride": 4, "qkv_bias": False}, IMAGES | HIDDEN),
    "larger images": (ViTForImageClassification, {"num_labels": 5}, LARGER),
}


def vit_b_16() -> nn.Module:
    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig(num_labels=1000))


@pytest.mark.parametrize("variant", VARIANTS)
class TestViT(TowerConformance):
    @pytest.fixture
    def network(self, variant):
        network, settings, inputs = VARIANTS[variant]
        return built(network, ViTConfig(**SIZES, **IMAGE, **settings)), inputs


def test_vit_b_16_has_the_published_multiply_accumulates_and_space():
    supernet = Supernet(vit_b_16(), "instatune")
    macs = MACs(supernet, torch.zeros(1, 3, 224, 224))
    assert macs(supernet.space.largest) == 17_563_828_224
    assert supernet.space.size == 9_659_108_818_944
    tokens, width, heads, units = 197, 768, 6, 2048  # closed form of the smallest: 11 blocks of these
    block = 4 * tokens * width * 64 * heads + 2 * tokens**2 * 64 * heads + 2 * tokens * width * units
    assert macs(supernet.space.smallest) == 11 * block + 196 * width**2 + width * 1000


def test_the_second_preset_is_the_toolkits():
    assert default_space(vit_b_16(), "dynast").size == 9_721_026_183_168


def test_a_config_says_what_all_blocks_share_and_no_more():
    model = built(ViTForImageClassification, ViTConfig(**SIZES, **IMAGE, num_labels=5))
    supernet = Supernet(model)
    alike = {"depth": 3, **{f"layers.{i}.heads": 2 for i in range(3)}}
    small = supernet.extract(supernet.space.architecture({**alike, "layers.1.mlp": 5}))
    config = small.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (3, 2, 6)
    assert config.intermediate_size == 20
    small = supernet.extract(supernet.space.architecture({"depth": 2, "layers.0.heads": 1}))
    assert (small.config.num_hidden_layers, small.config.num_attention_heads) == (2, 4)
    assert not hasattr(small.config, "head_dim")
    assert small.vit.layers[0].attention.num_attention_heads == 1
    assert model.config.num_hidden_layers == 3


def test_an_extracted_network_is_searched_again():
    model = built(ViTForImageClassification, ViTConfig(**SIZES, **IMAGE, num_labels=5))
    supernet = Supernet(model)
    small = supernet.extract(supernet.space.architecture({"depth": 2, "layers.0.heads": 2}))
    again = Supernet(small, default_space(small, heads=(1, 2), mlp=(5,)))
    assert again.space["layers.0.heads"].values == (1, 2)
    tiny = again.extract(again.space.smallest)
    with again.using(again.space.smallest):
        assert torch.equal(small(**IMAGES).logits, tiny(**IMAGES).logits)


def test_an_attention_that_is_not_known_is_refused_by_name():
    class OtherAttention(ViTAttention):
        pass

    model = built(ViTForImageClassification, ViTConfig(**SIZES, **IMAGE))
    model.vit.layers[1].attention = OtherAttention(model.config)
    with pytest.raises(
        UnsupportedError, match=r"vit.layers.1.attention is a .*OtherAttention.*: ViTAttention"
    ):
        Supernet(model)


def test_an_attention_implementation_that_is_not_known_is_refused_with_the_ones_that_are():
    model = built(ViTForImageClassification, ViTConfig(**SIZES, **IMAGE))
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedError, match=r"'flex_attention' is not supported.*'sdpa' or 'eager'"):
        Supernet(model)


def test_a_network_that_holds_two_of_a_kind_is_refused():
    class Pair(ViTForImageClassification):
        def __init__(self, config):
            super().__init__(config)
            self.second = ViTModel(config)

    with pytest.raises(UnsupportedError, match=r"Pair holds 2 networks \(vit, second\).*: ViTModel"):
        Supernet(Pair(ViTConfig(**SIZES, **IMAGE)))
