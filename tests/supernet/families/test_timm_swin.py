from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from lightning_nas.costs import MACs
from lightning_nas.errors import UnsupportedError
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.supernet import Supernet, default_space
from lightning_nas.testing import FamilyConformance, randomise

SIZES: dict[str, Any] = {
    "img_size": 32, "num_classes": 5, "embed_dim": 8, "depths": (2, 3), "num_heads": (2, 4),
    "window_size": 4, "mlp_ratio": 2.0,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "two matrix products": {"drop_path_rate": 0.2, "drop_rate": 0.1, "attn_drop_rate": 0.1},
    "fused attention": {"fused": True},
    "padded windows that are not square": {"img_size": (40, 28), "window_size": (4, 2), "qkv_bias": False},
    "any image size, fused": {"img_size": (48, 32), "strict_img_size": False, "fused": True},
    "features, heads of a size of their own": {"num_classes": 0, "global_pool": "", "head_dim": 3},
}


def build(variant: str = "two matrix products") -> SwinTransformer:
    settings = {**SIZES, **VARIANTS[variant]}
    fused = settings.pop("fused", False)
    torch.manual_seed(0)
    model = randomise(SwinTransformer(**settings)).eval()
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.fused_attn = fused
    return model


def images(model: SwinTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=generator)


@pytest.mark.parametrize("variant", VARIANTS)
class TestVariants(FamilyConformance):
    @pytest.fixture
    def network(self, variant):
        model = build(variant)
        return model, images(model)

    def space(self, model):
        return default_space(model, depth=(0.5, 1.0))


def test_the_choices_are_those_of_the_stages():
    space = default_space(build(), depth=(1, 1.0), shared=True, heads=(0.5, 1.0), mlp=(4, 1.0))
    assert {name: space[name].values for name in space.names} == {
        "stages.0.depth": (1, 2), "stages.0.heads": (1, 2), "stages.0.mlp": (4, 16),
        "stages.1.depth": (1, 3), "stages.1.heads": (2, 4), "stages.1.mlp": (4, 32),
    }  # fmt: skip


def test_multiply_accumulates_are_those_counted_by_hand():
    model = build()
    supernet = Supernet(model, default_space(model, depth=(1, 1.0), shared=True, heads=(1, 2), mlp=(4, 16)))
    macs = MACs(supernet, images(model)[:1])

    def block(tokens: int, windows: int, width: int, heads: int, hidden: int) -> int:
        inside = heads * 4  # both stages have heads of 4
        attention = tokens * width * 3 * inside + 2 * windows * 16**2 * inside + tokens * inside * width
        return attention + 2 * tokens * width * hidden

    # Patches of 4 pixels: 8 x 8 tokens, 4 windows; merged four to one: 4 x 4 tokens, 1 window.
    always = 64 * (3 * 4 * 4) * 8 + 16 * (4 * 8) * 16 + 16 * 5
    small = block(64, 4, 8, heads=1, hidden=4) + block(16, 1, 16, heads=1, hidden=4)
    large = 2 * block(64, 4, 8, heads=2, hidden=16) + 3 * block(16, 1, 16, heads=2, hidden=16)
    assert macs(supernet.space.smallest) == always + small
    assert macs(supernet.space.largest) == always + large


def test_an_extracted_network_with_its_first_blocks_has_the_shapes_of_a_new_one_of_that_size():
    model = build()
    space = default_space(
        model, keep="first", depth={"stages.1.depth": (2, 3)}, heads=(1.0,), mlp=(0.5, 1.0), shared=True
    )
    small = Supernet(model, space).extract(space.smallest)
    new = SwinTransformer(**{**SIZES, "depths": (2, 2), "mlp_ratio": 1.0}).eval()
    new.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(images(model)), new(images(model)))
    assert [stage.depth for stage in small.layers] == [2, 2]
    assert small.feature_info == new.feature_info


def test_a_block_of_fewer_heads_keeps_their_columns_of_the_bias_table():
    model = build()
    before = [block.attn.relative_position_bias_table.detach().clone() for block in model.layers[1].blocks]
    supernet = Supernet(model, SearchSpace([Choice("stages.1.heads", (3, 4))]))
    small = supernet.extract(supernet.space.smallest)
    for block, table in zip(small.layers[1].blocks, before, strict=True):
        assert block.attn.num_heads == 3
        assert torch.equal(block.attn.relative_position_bias_table, table[:, :3])


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = build("fused attention").requires_grad_()
        model.set_grad_checkpointing(checkpointed)
        supernet = Supernet(model, default_space(model, depth=(0.5, 1.0)))
        supernet.activate(supernet.space.smallest)
        model(images(model)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_second_version_is_refused_and_the_first_one_named():
    with pytest.raises(UnsupportedError, match=r"SwinTransformerV2 is not a supported.*SwinTransformer'?\b"):
        Supernet(SwinTransformerV2(**{**SIZES, "depths": (1, 1)}))


def test_an_attention_of_another_class_is_refused_by_name():
    model = build()
    model.layers[1].blocks[0].attn = nn.Identity()
    with pytest.raises(UnsupportedError, match=r"layers.1.blocks.0.attn is a .*Supported: WindowAttention"):
        Supernet(model)
