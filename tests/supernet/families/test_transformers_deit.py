from __future__ import annotations

import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
)

from lightning_nas.supernet import default_space
from tests.supernet.families.towers import IMAGE, SIZES, TowerConformance, built, drawn

IMAGES = {"pixel_values": drawn(2, 3, 16, 16)}
HIDDEN = {"bool_masked_pos": torch.arange(32).view(2, 16) % 3 == 0}
LARGER = {"pixel_values": drawn(2, 3, 24, 24), "interpolate_pos_encoding": True}
VARIANTS = {
    "classification": (DeiTForImageClassification, {}, IMAGES | {"labels": torch.tensor([0, 1])}),
    "taught head": (DeiTForImageClassificationWithTeacher, {"qkv_bias": False}, LARGER),
    "masked patches": (DeiTForMaskedImageModeling, {"encoder_stride": 4}, IMAGES | HIDDEN),
    "features": (DeiTModel, {}, IMAGES),
}


@pytest.mark.parametrize("variant", VARIANTS)
class TestDeiT(TowerConformance):
    @pytest.fixture
    def network(self, variant):
        network, settings, inputs = VARIANTS[variant]
        return built(network, DeiTConfig(**SIZES, **IMAGE, **settings)), inputs


def test_deit_base_has_the_space_of_vit_base():
    with torch.device("meta"):
        model = DeiTForImageClassification(DeiTConfig(num_labels=1000))
    assert default_space(model, "instatune").size == 9_659_108_818_944
