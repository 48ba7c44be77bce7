from __future__ import annotations

import pytest
import torch
from transformers import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling, BeitModel

from lightning_nas.costs import MACs
from lightning_nas.errors import UnsupportedError
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.supernet import Supernet, default_space
from tests.supernet.families.towers import IMAGE, SIZES, TowerConformance, built, drawn

IMAGES = {"pixel_values": drawn(2, 3, 16, 16)}
LABELS = {"labels": torch.tensor([0, 1])}
PATCHES = {"bool_masked_pos": torch.arange(32).view(2, 16) % 4 == 0, "labels": torch.arange(8)}
LARGER = {"pixel_values": drawn(2, 3, 24, 24)}
OWN, SHARED = {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}
ABSOLUTE = {"use_absolute_position_embeddings": True}
VARIANTS = {
    "own biases": (BeitForImageClassification, OWN, IMAGES | LABELS),
    "own biases, larger images": (BeitForImageClassification, OWN, LARGER),
    "one bias": (BeitForImageClassification, SHARED | {"use_mean_pooling": False}, IMAGES | LABELS),
    "both, larger images": (BeitModel, OWN | SHARED, LARGER | {"interpolate_pos_encoding": True}),
    "absolute positions, no scales": (BeitModel, ABSOLUTE | {"layer_scale_init_value": 0.0}, IMAGES),
    "masked patches": (
        BeitForMaskedImageModeling, OWN | {"use_mask_token": True, "vocab_size": 9}, IMAGES | PATCHES,
    ),
}  # fmt: skip


def beit(network=BeitForImageClassification, **settings):
    return built(network, BeitConfig(**SIZES, **IMAGE, drop_path_rate=0.0, **settings))


@pytest.mark.parametrize("variant", VARIANTS)
class TestBEiT(TowerConformance):
    @pytest.fixture
    def network(self, variant):
        network, settings, inputs = VARIANTS[variant]
        return beit(network, **settings), inputs


def test_beit_base_has_the_published_spaces():
    with torch.device("meta"):
        model = BeitForImageClassification(BeitConfig(num_labels=1000, **OWN))
    assert default_space(model, "instatune").size == 9_659_108_818_944
    assert default_space(model, "instatune", depth=(9, 10, 11, 12)).size == 9_726_185_963_520
    macs = MACs(Supernet(model, "instatune"), torch.zeros(1, 3, 224, 224))
    assert macs(macs.supernet.space.largest) == 17_563_828_224  # ViT-B/16's: biases are added, not multiplied


def test_heads_take_their_columns_of_the_bias_along_when_they_are_reordered():
    model = beit(**OWN)
    table = model.beit.layers[1].relative_position_bias.relative_position_bias_table
    before = table.detach().clone()
    done = Supernet(model).reorder({"layers.1.heads": torch.tensor([0.0, 3.0, 1.0, 2.0])})
    assert torch.equal(table, before[:, [1, 3, 2, 0]])
    assert table in done


def test_blocks_that_share_one_bias_have_one_choice_of_heads_and_keep_their_order():
    model = beit(**SHARED)
    supernet = Supernet(model)
    assert "heads" in supernet.space
    assert {"layers.0.mlp", "depth"} <= set(supernet.space.names)
    assert not {"heads", "layers.0.heads"} & set(supernet.magnitude())
    small = supernet.extract(supernet.space.architecture({"heads": 2}))
    assert {layer.attention.num_attention_heads for layer in small.beit.layers} == {2}
    assert small.beit.shared_position_bias.relative_position_bias_table.shape[1] == 2
    supernet.release()
    with pytest.raises(ValueError, match=r"there is no choice 'layers.0.heads' in it"):
        Supernet(model, SearchSpace([Choice("layers.0.heads", (2, 4))]))


def test_the_config_of_a_shallower_network_offers_the_stages_that_it_has():
    supernet = Supernet(beit(**OWN))
    config = supernet.extract(supernet.space.smallest).config
    assert config.stage_names == ["stem", "stage1", "stage2"]
    assert config.out_features == ["stage2"]


def test_dropped_paths_stay_with_their_blocks():
    model = built(BeitForImageClassification, BeitConfig(**SIZES, **IMAGE, drop_path_rate=0.4, **OWN))
    supernet = Supernet(model, default_space(model, keep={2: (0, 2), 3: (0, 1, 2)}))
    small = supernet.extract(supernet.space.smallest)
    assert small.beit.layers[1].drop_path.drop_prob == model.beit.layers[2].drop_path.drop_prob == 0.4


def test_another_relative_position_bias_is_refused_by_name():
    class OtherBias(type(beit(**OWN).beit.layers[0].relative_position_bias)):
        pass

    model = beit(**OWN)
    model.beit.layers[2].relative_position_bias = OtherBias(model.config)
    with pytest.raises(UnsupportedError, match=r"layers.2.relative_position_bias is a .*OtherBias"):
        Supernet(model)
