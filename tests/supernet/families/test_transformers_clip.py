from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from lightning_nas.supernet import Supernet, default_space
from tests.supernet.families.towers import IMAGE, SIZES, TowerConformance, assert_equal, built, drawn, tokens

TEXT = {
    **SIZES,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "num_hidden_layers": 4,
    "vocab_size": 30,
    "max_position_embeddings": 9,
    "projection_dim": 8,
}
VISION = {**SIZES, **IMAGE, "projection_dim": 8}
PADDED = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
IMAGES = {"pixel_values": drawn(2, 3, 16, 16)}
IDS = tokens(2, 7)
IDS[0, 6] = IDS[1, 3] = 1  # the end, whose state is the text's
WORDS = {"input_ids": IDS, "attention_mask": PADDED}
LARGER = {"pixel_values": drawn(2, 3, 24, 24), "interpolate_pos_encoding": True}


def both():
    return CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)


VARIANTS = {
    "both towers": (CLIPModel, both, WORDS | IMAGES | {"return_loss": True}),
    "classification": (CLIPForImageClassification, both, IMAGES | {"labels": torch.tensor([0, 1])}),
    "vision": (CLIPVisionModel, lambda: CLIPVisionConfig(**VISION), LARGER),
    "vision, projected": (CLIPVisionModelWithProjection, lambda: CLIPVisionConfig(**VISION), IMAGES),
    "text": (CLIPTextModel, lambda: CLIPTextConfig(**TEXT), {"input_ids": IDS}),
    "text, projected": (CLIPTextModelWithProjection, lambda: CLIPTextConfig(**TEXT), WORDS),
}


@pytest.mark.parametrize("variant", VARIANTS)
class TestCLIP(TowerConformance):
    stated = {"heads": ()}  # noqa: RUF012  # its heads are as wide as the width over their number

    @pytest.fixture
    def network(self, variant):
        network, config, inputs = VARIANTS[variant]
        return built(network, config()), inputs


def test_each_tower_has_its_own_depth_heads_and_units():
    model = built(CLIPModel, both())
    supernet = Supernet(model)
    names = set(supernet.space.names)
    assert {"vision.depth", "text.depth", "vision.layers.2.heads", "text.layers.3.mlp"} <= names
    chosen = {"vision.depth": 2, "text.depth": 3, "vision.layers.0.heads": 1, "text.layers.0.mlp": 5}
    small = supernet.extract(supernet.space.architecture(chosen))
    assert (len(small.vision_model.encoder.layers), len(small.text_model.encoder.layers)) == (2, 3)
    assert (small.config.vision_config.num_hidden_layers, small.config.text_config.num_hidden_layers) == (
        2,
        3,
    )
    assert small.vision_model.encoder.layers[0].self_attn.num_heads == 1
    assert small.text_model.encoder.layers[0].self_attn.num_heads == 4
    assert small.text_model.encoder.layers[0].mlp.fc1.out_features == 5
    assert "vision.heads" in default_space(built(CLIPModel, both()), shared=True)


def test_a_network_of_one_tower_has_names_without_a_prefix():
    space = default_space(built(CLIPForImageClassification, both()))
    assert {"depth", "layers.0.heads", "layers.2.mlp"} <= set(space.names)


@torch.no_grad()
def test_features_of_images_and_texts_are_those_of_the_extracted_network():
    model = built(CLIPModel, both())
    supernet = Supernet(model)
    small = supernet.extract(supernet.space.smallest)
    with supernet.using(supernet.space.smallest):
        images, words = model.get_image_features(**IMAGES), model.get_text_features(**WORDS)
    assert_equal(small.get_image_features(**IMAGES), images)
    assert_equal(small.get_text_features(**WORDS), words)


def test_the_contrastive_loss_reaches_both_towers_and_only_what_runs():
    model = built(CLIPModel, both())
    supernet = Supernet(model)
    with supernet.using(supernet.space.smallest):
        model(**WORDS, **IMAGES, return_loss=True).loss.backward()
    for tower in (model.vision_model, model.text_model):
        weight = tower.encoder.layers[0].self_attn.q_proj.weight
        assert bool((weight.grad[:6] != 0).any())
        assert bool((weight.grad[6:] == 0).all())


def test_states_of_a_tower_are_features_and_similarities_are_logits():
    def returns_features(variant):
        network, config, _ = VARIANTS[variant]
        supernet = Supernet(built(network, config()))
        return supernet.family.returns_features(supernet.model)

    features = {variant for variant in VARIANTS if returns_features(variant)}
    assert features == {"vision", "vision, projected", "text", "text, projected"}
