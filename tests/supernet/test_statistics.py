"""Batch-norm statistics: each subnetwork has its own, and nothing of one leaks into another."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightning_nas.errors import NASError
from lightning_nas.space import Architecture
from lightning_nas.supernet import Supernet, default_space
from lightning_nas.testing import randomise

STALE = "batch-norm statistics of the (active subnetwork|extracted network) are the largest network's"


def tiny(**changes) -> ResNet:
    settings = {
        "channels": (16, 16, 8, 8),
        "num_classes": 4,
        "drop_path_rate": 0.3,
        "drop_rate": 0.3,
        **changes,
    }
    return randomise(ResNet(Bottleneck, (1, 3, 1, 1), **settings)).eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) + seed


@pytest.fixture
def supernet() -> Supernet:
    model = tiny()
    return Supernet(model, default_space(model, width=(0.5, 1.0)))


BATCHES = [images(6, 0), images(6, 1), images(4, 2)]
INPUTS = images(3, 5)


def outputs(supernet: Supernet) -> torch.Tensor:
    with torch.no_grad():
        return supernet.model(INPUTS)


def by_hand(network: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Means over the batches of each batch's mean and unbiased variance, in float64, norm after norm."""
    network = copy.deepcopy(network).double().eval()
    found: dict[str, torch.Tensor] = {}
    for name, norm in network.named_modules():  # each norm's inputs depend on batch statistics of the others
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(lambda m, args, name=name: gather(found, name, m, args[0]))
            norm.running_mean = norm.running_var = None  # normalises by the batch
    for batch in batches:
        network(batch.double())
    return {name: total / len(batches) for name, total in found.items()}


def gather(found: dict[str, torch.Tensor], name: str, norm: nn.Module, x: torch.Tensor) -> None:
    values = x.detach().transpose(0, 1).flatten(1)
    for kind, value in (("running_mean", values.mean(1)), ("running_var", values.var(1, unbiased=True))):
        found[f"{name}.{kind}"] = found.get(f"{name}.{kind}", 0) + value


@pytest.mark.parametrize("samples", [1, 6, 7, 12, 13, 10_000])
def test_recalibrated_statistics_are_plain_means_over_as_many_batches_as_hold_the_samples(supernet, samples):
    smallest = supernet.space.smallest
    with supernet.using(smallest):
        supernet.recalibrate(iter(BATCHES), samples=samples)
    extracted = supernet.extract(smallest)
    used = {1: 1, 6: 1, 7: 2, 12: 2}.get(samples, 3)
    statistics = {name: value for name, value in extracted.named_buffers() if "running" in name}
    expected = by_hand(extracted, BATCHES[:used])
    assert set(statistics) == set(expected)
    for name, value in statistics.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-5)
    assert {int(v) for n, v in extracted.named_buffers() if n.endswith("tracked")} == {used}


def test_recalibration_takes_no_batch_more_than_it_needs(supernet):
    batches = iter(BATCHES)
    with supernet.using(supernet.space.smallest):
        supernet.recalibrate(batches, samples=7)
    assert torch.equal(next(batches), BATCHES[2])


def test_statistics_of_one_architecture_never_reach_another(supernet):
    one, other, largest = supernet.space.smallest, middle(supernet), supernet.space.largest
    whole, state = outputs(supernet), copy.deepcopy(supernet.model.state_dict())
    seen = {}
    for architecture, batches in ((one, BATCHES[:1]), (other, BATCHES[1:])):
        supernet.activate(architecture)
        supernet.recalibrate(batches)
        seen[architecture] = outputs(supernet)
    assert not torch.equal(seen[one], seen[other])
    for architecture in (one, other, one):
        supernet.activate(architecture)
        assert not supernet.is_stale
        assert torch.equal(outputs(supernet), seen[architecture])
    supernet.activate(largest)
    assert torch.equal(outputs(supernet), whole)
    for name, value in supernet.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    alone = Supernet(tiny(), supernet.space)  # never saw the other architecture
    alone.activate(one)
    alone.recalibrate(BATCHES[:1])
    assert torch.equal(outputs(alone), seen[one])


def middle(supernet: Supernet) -> Architecture:
    return supernet.space.architecture({"stages.1.width": 32, "stages.0.layers.0.expand": 8})


def test_the_whole_network_keeps_what_training_gave_it(supernet):
    state, before = copy.deepcopy(supernet.model.state_dict()), outputs(supernet)
    supernet.recalibrate(BATCHES)
    assert not supernet.is_stale
    assert torch.equal(outputs(supernet), before)
    assert all(torch.equal(value, state[name]) for name, value in supernet.model.state_dict().items())


def test_training_passes_of_subnetworks_leave_the_largest_networks_statistics_as_plain_training_does(
    supernet,
):
    plain = tiny().train()
    supernet.model.train()
    for seed, batch in enumerate(BATCHES):
        for network in (plain, supernet.model):
            torch.manual_seed(seed)
            network(batch)
        for architecture in (supernet.space.smallest, middle(supernet)):
            with supernet.using(architecture):
                supernet.model(batch).sum().backward()
    for (name, value), own in zip(plain.named_buffers(), supernet.model.buffers(), strict=True):
        assert torch.equal(own, value), name


def test_an_extracted_network_carries_its_statistics_bit_for_bit(supernet):
    for architecture in (supernet.space.smallest, middle(supernet)):
        supernet.activate(architecture)
        supernet.recalibrate(BATCHES)
        assert torch.equal(supernet.extract(architecture)(INPUTS), supernet.model(INPUTS))
    assert supernet.extract(supernet.space.smallest).layer1[0].bn1.running_mean.shape == (8,)


def test_what_is_extracted_is_a_copy_of_the_statistics(supernet):
    with supernet.using(supernet.space.smallest):
        supernet.recalibrate(BATCHES)
        before = outputs(supernet)
        extracted = supernet.extract(supernet.space.smallest).train()
        extracted(INPUTS)
        assert torch.equal(outputs(supernet), before)


def test_stale_statistics_warn_when_they_are_read_and_when_they_are_extracted(supernet):
    smallest = supernet.space.smallest
    assert not supernet.is_stale
    supernet.activate(smallest)
    assert supernet.is_stale
    with pytest.warns(UserWarning, match=STALE):
        outputs(supernet)
    with pytest.warns(UserWarning, match=STALE):
        supernet.extract(smallest)
    supernet.recalibrate(BATCHES)
    outputs(supernet)  # a warning would be an error
    supernet.extract(smallest)
    supernet.extract(supernet.space.largest)


@pytest.mark.parametrize("trained", ["largest", "smallest"])
def test_training_makes_statistics_stale(supernet, trained):
    with supernet.using(supernet.space.smallest):
        supernet.recalibrate(BATCHES)
    with supernet.using(getattr(supernet.space, trained)):
        supernet.model.train()(INPUTS)
    supernet.model.eval()
    supernet.activate(supernet.space.smallest)
    assert supernet.is_stale
    with pytest.warns(UserWarning, match=STALE):
        supernet.extract(supernet.space.smallest)


def test_weights_changed_behind_its_back_are_a_reason_to_forget_statistics(supernet):
    with supernet.using(supernet.space.smallest):
        supernet.recalibrate(BATCHES)
        supernet.forget_statistics()
        assert supernet.is_stale


def test_reordering_makes_statistics_stale_and_the_active_subnetwork_reads_none_in_the_old_order(supernet):
    supernet.activate(supernet.space.smallest)
    supernet.recalibrate(BATCHES)
    assert supernet.reorder({name: -score for name, score in supernet.magnitude().items()})
    assert supernet.is_stale
    fresh = Supernet(copy_of(supernet), supernet.space)
    with pytest.warns(UserWarning, match=STALE), fresh.using(supernet.active):
        expected = outputs(fresh)
    with pytest.warns(UserWarning, match=STALE):
        assert torch.equal(outputs(supernet), expected)


def copy_of(supernet: Supernet) -> nn.Module:
    model = tiny()
    model.load_state_dict(supernet.model.state_dict())
    return model


def test_only_norms_learn_while_statistics_are_recomputed_and_modes_come_back(supernet):
    model = supernet.model.train()
    model.layer2.eval()
    model.bn1.momentum = 0.25
    modes = {name: module.training for name, module in model.named_modules()}
    with supernet.using(supernet.space.smallest):
        supernet.recalibrate(BATCHES)  # with dropout and drop-path the next line would differ
        first = supernet.extract(supernet.space.smallest).state_dict()
        supernet.recalibrate(BATCHES)
        again = supernet.extract(supernet.space.smallest).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.bn1.momentum == 0.25
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_recalibration_that_fails_leaves_the_statistics_that_were_known(supernet):
    def breaking():
        yield BATCHES[2]
        raise RuntimeError("boom")

    supernet.activate(supernet.space.smallest)
    supernet.recalibrate(BATCHES)
    before, modes = outputs(supernet), [m.training for m in supernet.model.modules()]
    with pytest.raises(RuntimeError, match="boom"):
        supernet.recalibrate(breaking())
    with pytest.raises(ValueError, match="at least one batch is needed"):
        supernet.recalibrate([])
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        supernet.recalibrate(BATCHES, samples=0)
    assert torch.equal(outputs(supernet), before)
    assert [m.training for m in supernet.model.modules()] == modes


def test_processes_agree_on_the_mean_of_what_each_has_seen(supernet):
    elsewhere: list[torch.Tensor] = []
    with supernet.using(supernet.space.smallest):
        with supernet.recalibrating(lambda value: elsewhere.append(value.clone()) or value) as model:
            model(BATCHES[0])
        others = iter(elsewhere)
        with supernet.recalibrating(lambda value: (value + next(others)) / 2) as model:
            model(BATCHES[1])
        agreed = supernet.extract(supernet.space.smallest)
        supernet.recalibrate(BATCHES[:2])
        both = supernet.extract(supernet.space.smallest)
    for name, value in both.named_buffers():
        if "running" in name:
            torch.testing.assert_close(agreed.get_buffer(name), value)


def test_statistics_follow_the_model_to_another_precision(supernet):
    supernet.activate(supernet.space.smallest)
    supernet.recalibrate(BATCHES)
    extracted = supernet.extract(supernet.space.smallest).double()
    supernet.model.double()
    assert torch.equal(supernet.model(INPUTS.double()), extracted(INPUTS.double()))
    assert supernet.extract(supernet.space.smallest).bn1.running_mean.dtype == torch.float64


def test_pausing_and_releasing_keep_what_is_whole_and_what_is_known(supernet):
    whole = outputs(supernet)
    supernet.activate(supernet.space.smallest)
    supernet.recalibrate(BATCHES)
    before = outputs(supernet)
    with supernet.paused() as model, torch.no_grad():
        assert torch.equal(model(INPUTS), whole)
    assert torch.equal(outputs(supernet), before)
    supernet.release()
    assert torch.equal(outputs(supernet), whole)
    with pytest.raises(NASError, match="released"):
        supernet.recalibrate(BATCHES)


def test_a_network_without_batch_norm_needs_no_statistics():
    supernet = Supernet(VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=4))
    supernet.activate(supernet.space.smallest)
    assert not supernet.is_stale
    supernet.recalibrate([])


def test_norms_without_running_statistics_are_left_alone():
    model = tiny()
    model.bn1 = nn.BatchNorm2d(64, track_running_stats=False)
    supernet = Supernet(model)
    with supernet.using(supernet.space.smallest):
        supernet.recalibrate(BATCHES)
        assert torch.equal(supernet.model(INPUTS), supernet.extract(supernet.space.smallest)(INPUTS))
