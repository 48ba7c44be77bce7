from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_nas.costs import MACs, Parameters, costs, resolve
from lightning_nas.space import Choice, Depth, SearchSpace
from lightning_nas.supernet import Supernet, default_space


def on_meta(name, **settings):
    with torch.device("meta"):
        return timm.create_model(name, **settings)


def by_formula(width, tokens, blocks):
    """Multiply-accumulates of the encoder: per block (heads of 64, MLP units)."""
    n = tokens
    return sum(4 * n * width * 64 * h + 2 * n**2 * 64 * h + 2 * n * width * m for h, m in blocks)


def test_vit_base_costs_what_the_papers_say():
    supernet = Supernet(on_meta("vit_base_patch16_224"), "instatune")
    macs = MACs(supernet, torch.zeros(1, 3, 224, 224, device="meta"))
    ends = 196 * 768 * 768 + 768 * 1000
    assert macs(supernet.space.largest) == by_formula(768, 197, [(12, 3072)] * 12) + ends
    assert round(macs(supernet.space.largest) / 1e9, 2) == 17.56  # 17.6 in InstaTune, table 1
    assert macs(supernet.space.smallest) == by_formula(768, 197, [(6, 2048)] * 11) + ends
    mixed = supernet.space.architecture({"layers.3.heads": 8, "layers.7.mlp": 2560})
    expected = by_formula(768, 197, [(12, 3072)] * 10 + [(8, 3072), (12, 2560)]) + ends
    assert macs(mixed) == expected
    assert Parameters(supernet)(supernet.space.largest) == 86_567_656  # timm's results table: 86.57 M


def test_a_network_that_looks_at_the_values_of_its_inputs_is_counted_on_them():
    class SkipsEmptyImages(VisionTransformer):
        def forward(self, x):
            return super().forward(x[x.flatten(1).any(1)])

    model = SkipsEmptyImages(img_size=16, patch_size=4, num_classes=5, embed_dim=36, depth=3, num_heads=4)
    supernet = Supernet(model)
    images = torch.ones(3, 3, 16, 16)
    ends = [supernet.space.largest, supernet.space.smallest]
    whole = MACs(supernet, images).many(ends)
    images[1] = 0
    assert list(3 * MACs(supernet, images).many(ends)) == list(2 * whole)
    with pytest.raises(RuntimeError, match="channels"):
        MACs(supernet, torch.ones(1, 4, 16, 16))


def test_blocks_that_only_smaller_depths_keep_are_counted():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=5)
    depth = Depth("depth", (2, 3), keeps=((0, 3), (0, 1, 2)))
    supernet = Supernet(model, SearchSpace([depth, Choice("heads", (2, 3))]))
    image = torch.zeros(1, 3, 32, 32)
    for architecture in supernet.space.enumerate():
        extracted = supernet.extract(architecture)
        supernet.family.unfuse(extracted)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            extracted(image)
        assert 2 * MACs(supernet, image)(architecture) == counter.get_total_flops()


def test_a_batch_costs_as_often_as_it_has_images():
    supernet = Supernet(on_meta("vit_tiny_patch16_224"))
    one = MACs(supernet, torch.zeros(1, 3, 224, 224))
    four = MACs(supernet, {"x": torch.zeros(4, 3, 224, 224)})
    assert MACs(supernet, (torch.zeros(1, 3, 224, 224),))(supernet.space.largest) == one(
        supernet.space.largest
    )
    assert four(supernet.space.smallest) == 4 * one(supernet.space.smallest)


def test_more_pixels_cost_more_where_the_size_is_dynamic():
    supernet = Supernet(on_meta("vit_tiny_patch16_224", dynamic_img_size=True, num_classes=0))
    width, blocks = 192, [(3, 768)] * 12
    for pixels, tokens in ((224, 197), (160, 101)):
        macs = MACs(supernet, torch.zeros(1, 3, pixels, pixels))
        assert macs(supernet.space.largest) == by_formula(width, tokens, blocks) + (tokens - 1) * 768 * width


def test_every_architecture_of_a_small_space_is_counted_exactly():
    model = VisionTransformer(
        img_size=8, patch_size=4, num_classes=3, embed_dim=12, depth=2, num_heads=2
    ).eval()
    supernet = Supernet(model, default_space(model, heads=(1, 2), mlp=(5, 48), depth=(1, 2), embed=(7, 12)))
    images = torch.zeros(1, 3, 8, 8)
    macs, parameters = MACs(supernet, images), Parameters(supernet)
    architectures = list(supernet.space.enumerate())
    assert len(architectures) == 2 * (4 + 16)
    counted = []
    for architecture in architectures:
        extracted = supernet.extract(architecture).requires_grad_(False)
        for block in extracted.blocks:
            block.attn.fused_attn = False
        with FlopCounterMode(display=False) as counter:
            extracted(images)
        counted.append((counter.get_total_flops() // 2, sum(p.numel() for p in extracted.parameters())))
    assert [(macs(a), parameters(a)) for a in architectures] == counted
    assert np.array_equal(np.stack([macs.many(architectures), parameters.many(architectures)], 1), counted)


def test_architectures_that_are_the_same_network_cost_the_same():
    supernet = Supernet(
        on_meta("vit_tiny_patch16_224"),
        SearchSpace([Choice("depth", (6, 12)), Choice("layers.9.mlp", (1, 768))]),
    )
    macs = MACs(supernet, torch.zeros(1, 3, 224, 224))
    assert macs({"depth": 6, "layers.9.mlp": 1}) == macs({"depth": 6, "layers.9.mlp": 768})
    assert macs({"depth": 12, "layers.9.mlp": 1}) < macs({"depth": 12, "layers.9.mlp": 768})


def test_excluded_and_shared_choices_are_counted():
    model = on_meta("vit_tiny_patch16_224")
    supernet = Supernet(model, default_space(model, shared=True, depth=()), exclude="heads")
    macs = MACs(supernet, torch.zeros(1, 3, 224, 224))
    ends = 196 * 768 * 192 + 192 * 1000
    assert macs(supernet.space.smallest) == by_formula(192, 197, [(3, 192)] * 12) + ends


def test_counting_leaves_the_supernet_alone():
    model = VisionTransformer(
        img_size=8, patch_size=4, num_classes=3, embed_dim=12, depth=3, num_heads=2
    ).train()
    supernet = Supernet(model)
    supernet.activate(supernet.space.smallest)
    MACs(supernet, torch.zeros(1, 3, 8, 8))
    assert supernet.active == supernet.space.smallest
    assert model.training
    assert all(block.attn.fused_attn for block in model.blocks)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_network_that_looks_at_values_can_tell_that_it_is_only_counted():
    class Careful(VisionTransformer):
        def forward(self, x):
            if not isinstance(x, FakeTensor) and x.isnan().any():
                raise ValueError("not a number")
            return super().forward(x)

    sizes = {"img_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 12, "depth": 3, "num_heads": 2}
    images = torch.zeros(1, 3, 8, 8)
    careful, plain = (MACs(Supernet(make(**sizes)), images) for make in (Careful, VisionTransformer))
    assert careful(careful.supernet.space.smallest) == plain(plain.supernet.space.smallest)


def test_an_empty_list_costs_an_empty_array_of_integers():
    supernet = Supernet(on_meta("vit_tiny_patch16_224"))
    empty = Parameters(supernet).many([])
    assert empty.shape == (0,)
    assert empty.dtype == np.int64


def test_names_stand_for_costs_and_a_user_may_add_one():
    supernet = Supernet(on_meta("vit_tiny_patch16_224"))
    images = torch.zeros(1, 3, 224, 224)
    named = [resolve(name, supernet, images) for name in ("macs", "params")]
    assert [(cost.name, cost.unit) for cost in named] == [("macs", "MACs"), ("params", "parameters")]
    assert resolve(named[0], supernet, images) is named[0]
    with pytest.raises(ValueError, match=r"Unknown cost 'mac'. Did you mean 'macs'"):
        resolve("mac", supernet, images)
    with pytest.raises(TypeError, match=r"must be a name or a callable"):
        resolve(3, supernet, images)

    class Heads:
        name, unit = "heads", "heads"

        def __call__(self, architecture):
            return sum(value for name, value in architecture.items() if name.endswith("heads"))

        def many(self, architectures):
            return np.array([self(architecture) for architecture in architectures])

    costs.register("heads")(lambda supernet, example_inputs: Heads())
    assert resolve("heads", supernet, images)(supernet.space.largest) == 36
