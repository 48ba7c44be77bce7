from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn

from lightning_nas.space import SearchSpace
from lightning_nas.supernet import Supernet, permute_like
from lightning_nas.testing import randomise

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def tiny(depth=3, **settings):
    model = VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=32, depth=depth, num_heads=4, **settings
    )
    return randomise(model).double().eval()


def loss_of(model, images=IMAGES, labels=LABELS):
    return F.cross_entropy(model(images), labels)


def shuffled(supernet, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(len(score), generator=generator) for name, score in supernet.magnitude().items()}


def derivative_of_scaling(module, columns):
    """|dL / dg| at g = 1, where g scales what one unit hands on: what first-order importance should be."""
    model, layer = module
    weight = layer._parameters["weight"]
    gate = torch.ones((), dtype=torch.float64, requires_grad=True)
    scaled = torch.cat([weight[:, : columns.start], gate * weight[:, columns], weight[:, columns.stop :]], 1)
    name = next(n for n, parameter in model.named_parameters() if parameter is weight)
    output = torch.func.functional_call(model, {name: scaled}, (IMAGES,))
    return torch.autograd.grad(F.cross_entropy(output, LABELS), gate)[0].abs()


def test_importance_is_the_derivative_of_scaling_a_unit():
    model = tiny()
    plain = copy.deepcopy(model)
    supernet = Supernet(model)
    loss_of(model).backward()
    importance = supernet.importance()
    for i, block in enumerate(plain.blocks):
        heads = [derivative_of_scaling((plain, block.attn.proj), slice(8 * h, 8 * h + 8)) for h in range(4)]
        units = [derivative_of_scaling((plain, block.mlp.fc2), slice(u, u + 1)) for u in (0, 5, 127)]
        torch.testing.assert_close(importance[f"layers.{i}.heads"], torch.stack(heads))
        torch.testing.assert_close(importance[f"layers.{i}.mlp"][[0, 5, 127]], torch.stack(units))


def test_a_unit_that_does_nothing_has_no_importance_and_goes_last():
    model = tiny()
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[:, 8:16] = 0
        model.blocks[1].mlp.fc2.weight[:, 3] = 0
    supernet = Supernet(
        model, order="importance", calibration=[(IMAGES,)], loss=lambda out, _: out.square().sum()
    )
    heads = model.blocks[1].attn.proj._parameters["weight"].abs().sum(0).view(4, 8).sum(1)
    units = model.blocks[1].mlp.fc2._parameters["weight"].abs().sum(0)
    assert heads[3] == 0
    assert units[-1] == 0
    assert supernet.magnitude()["layers.1.heads"][3] == 0


def test_units_stand_in_descending_order_after_ordering():
    supernet = Supernet(tiny(), order="magnitude")
    for score in supernet.magnitude().values():
        assert torch.equal(score, score.sort(descending=True).values)


def test_equal_scores_move_nothing():
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    supernet = Supernet(model)
    assert supernet.reorder({"layers.0.heads": torch.ones(4), "layers.0.mlp": torch.arange(128, 0, -1)}) == {}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_subnetwork_after_ordering_is_made_of_the_units_with_the_highest_scores():
    model = tiny(depth=1)
    chosen = copy.deepcopy(model)
    supernet = Supernet(model)
    supernet.reorder({"layers.0.heads": torch.tensor([0.1, 0.9, 0.2, 0.8])})
    small = supernet.extract(supernet.space.architecture({"layers.0.heads": 2}))
    with torch.no_grad():  # heads 0 and 2 silenced by hand
        chosen.blocks[0].attn.proj.weight.view(32, 4, 8)[:, [0, 2]] = 0
    torch.testing.assert_close(small(IMAGES), chosen(IMAGES), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
        {"mlp_layer": SwiGLUPacked},
        {"block_fn": ParallelThingsBlock},
        {"block_fn": ParallelScalingBlock, "qkv_bias": False},
    ],
)
def test_ordering_moves_gradients_along(settings):
    model = tiny(**settings)
    supernet = Supernet(model)
    loss_of(model).backward()
    moved = supernet.reorder(shuffled(supernet))
    kept = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss_of(model).backward()
    assert moved
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            kept[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    ],
)
def test_the_step_after_ordering_is_the_one_that_would_have_been_taken_permuted(make):
    model, plain = tiny(), tiny()
    optimizers = [make(model.parameters()), make(plain.parameters())]
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    averaged = [torch.optim.swa_utils.AveragedModel(own, multi_avg_fn=ema) for own in (model, plain)]
    supernet = Supernet(model)
    undo = {}
    for step in range(4):
        if step == 2:
            names = {parameter: name for name, parameter in model.named_parameters()}
            copies = dict(averaged[0].module.named_parameters())
            for parameter, permutations in supernet.reorder(shuffled(supernet)).items():
                for value in optimizers[0].state[parameter].values():
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        permute_like(value, permutations)
                permute_like(copies[names[parameter]], permutations)
                undo[names[parameter]] = permutations
        for own, optimizer, average in zip((model, plain), optimizers, averaged, strict=True):
            optimizer.zero_grad()
            loss_of(own).backward()
            optimizer.step()
            average.update_parameters(own)
    assert undo
    for ours, theirs in ((model, plain), (averaged[0].module, averaged[1].module)):
        theirs = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            expected = theirs[name].detach().clone()
            permute_like(expected, undo.get(name, []))
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-8, atol=1e-10)


def test_calibration_leaves_gradients_modes_and_freezing_alone():
    model = tiny().train()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = model.eval()(IMAGES)
    model.train()
    model.blocks[1].eval()
    state = torch.get_rng_state()
    batches = [(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])]
    supernet = Supernet(
        model, order="importance", calibration=batches, loss=lambda out, batch: F.cross_entropy(out, batch[1])
    )
    assert [block.training for block in model.blocks] == [True, False, True]
    assert not any(parameter.requires_grad for parameter in model.blocks[0].parameters())
    assert all(parameter.requires_grad for parameter in model.blocks[1].parameters())
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.eval()(IMAGES), before, rtol=1e-12, atol=1e-12)
    assert supernet.active == supernet.space.largest


def test_importance_of_several_batches_is_the_sum_of_theirs():
    parts = []
    for images, labels in ((IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])):
        model = tiny()
        supernet = Supernet(model)
        loss_of(model, images, labels).backward()
        parts.append(supernet.importance()["layers.1.mlp"])
    order = (parts[0] + parts[1]).argsort(descending=True, stable=True)
    expected = tiny().blocks[1].mlp.fc2.weight[:, order]
    model = tiny()
    Supernet(
        model,
        order="importance",
        calibration=[(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
    )
    assert torch.equal(model.blocks[1].mlp.fc2.weight, expected)


def test_faults_of_ordering_are_named():
    model = tiny()
    supernet = Supernet(model)
    with pytest.raises(ValueError, match=r"no weight has a gradient. Call backward\(\)"):
        supernet.importance()
    with pytest.raises(ValueError, match=r"no group 'layers.0.head' to order"):
        supernet.reorder({"layers.0.head": torch.ones(4)})
    with pytest.raises(ValueError, match=r"'layers.0.heads' needs 4 finite scores"):
        supernet.reorder({"layers.0.heads": torch.ones(5)})
    with pytest.raises(ValueError, match=r"with 1 that are not finite"):
        supernet.reorder({"layers.0.heads": torch.tensor([1.0, float("nan"), 0.0, 0.0])})
    moved = supernet.reorder({"layers.0.heads": torch.arange(4.0)})
    with pytest.raises(ValueError, match=r"dimension 0 must have 96 entries .* shape \(7,\)"):
        permute_like(torch.ones(7), moved[model.blocks[0].attn.qkv._parameters["weight"]])
    with pytest.raises(ValueError, match=r"output \(Tensor\) has no .loss"):
        Supernet(tiny(), order="importance", calibration=[IMAGES])
    with pytest.raises(ValueError, match=r"calibration is empty"):
        Supernet(tiny(), order="importance", calibration=[], loss=lambda *_: None)


def test_parallel_branches_share_a_choice_and_are_ordered_each_for_itself():
    model = tiny(block_fn=ParallelThingsBlock)
    supernet = Supernet(model)
    assert isinstance(supernet.space, SearchSpace)
    assert "layers.0.heads" in supernet.space
    assert {"layers.0.attns.0.heads", "layers.0.attns.1.heads", "layers.0.ffns.1.mlp"} <= set(
        supernet.magnitude()
    )
    small = supernet.extract(supernet.space.smallest)
    assert [branch.attn.num_heads for branch in small.blocks[0].attns] == [1, 1]


def test_a_permutation_is_a_bijection_of_whole_units():
    model = tiny()
    supernet = Supernet(model)
    for parameter, permutations in supernet.reorder(shuffled(supernet)).items():
        for permutation in permutations:
            index = permutation.index.numpy()
            assert sorted(index) == list(range(parameter.shape[permutation.dim]))
    qkv = model.blocks[0].attn.qkv._parameters["weight"]
    heads = np.asarray(supernet.reorder(shuffled(supernet, 1))[qkv][0].index).reshape(3, 4, 8)
    assert np.array_equal(heads % 8, np.broadcast_to(np.arange(8), (3, 4, 8)))
    assert np.array_equal(heads // 32, np.broadcast_to(np.arange(3)[:, None, None], (3, 4, 8)))
    assert isinstance(qkv, nn.Parameter)
