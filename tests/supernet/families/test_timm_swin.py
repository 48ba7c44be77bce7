from __future__ import annotations

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

from lightning_nas.costs import MACs
from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet import Supernet, default_space
from lightning_nas.testing import FamilyConformance, randomise

SIZES = {
    "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": (2, 3), "num_heads": (3, 6),
    "mlp_ratio": 2.0, "num_classes": 5,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "fused attention": {"fused": True},
    "windows that need padding": {"window_size": 3},
    "small heads": {"head_dim": 4},
    "no bias, regularised": {"qkv_bias": False, "drop_path_rate": 0.2, "proj_drop_rate": 0.1},
    "features": {"num_classes": 0},
    "any size": {"strict_img_size": False, "always_partition": True},
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(variant="plain"):
    settings = {**SIZES, **VARIANTS[variant]}
    fused = settings.pop("fused", False)
    model = randomise(SwinTransformer(**settings)).eval()
    for block in (block for stage in model.layers for block in stage.blocks):
        block.attn.fused_attn = fused
    return model


@pytest.mark.parametrize("variant", VARIANTS)
class TestSwin(FamilyConformance):
    @pytest.fixture
    def network(self, variant):
        return build(variant), IMAGES

    def space(self, model):
        return default_space(model, depth=(0.5, 1.0))


def test_the_default_space_has_depth_heads_and_units_of_each_stage():
    space = default_space(build())
    assert space["stages.1.depth"].values == (2, 3)
    assert "stages.0.depth" not in space
    assert space["stages.0.layers.1.heads"].values == (1, 2, 3)
    assert space["stages.1.layers.0.mlp"].values == (24, 48, 72, 96)
    shared = default_space(build(), shared=True)
    assert set(shared.names) == {
        "stages.1.depth", "stages.0.heads", "stages.0.mlp", "stages.1.heads", "stages.1.mlp",
    }  # fmt: skip


def test_macs_are_those_counted_by_hand():
    """Four windows of 16 tokens in the first stage, one in the second."""
    model = build()
    supernet = Supernet(model, default_space(model, depth=(2,), heads=(0.5, 1.0), mlp=(0.5, 1.0)))
    smallest = supernet.space.smallest

    def block(tokens, width, heads, units, head=8, window=16):
        attention = tokens * (4 * width * heads * head) + 2 * tokens * window * heads * head
        return attention + 2 * tokens * width * units

    stem = 64 * 24 * 3 * 4 * 4
    merging = 16 * (4 * 24) * 48
    by_hand = stem + 2 * block(64, 24, 2, 24) + merging + 2 * block(16, 48, 3, 48) + 48 * 5
    assert MACs(supernet, IMAGES[:1])(smallest) == by_hand


def test_the_second_version_is_refused_by_name():
    model = SwinTransformerV2(
        img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(1,), num_heads=(3,)
    )
    with pytest.raises(UnsupportedError, match=r"SwinTransformerV2 is not a supported network. Did you mean"):
        Supernet(model)
