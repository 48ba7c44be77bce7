from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from lightning_nas import Supernet
from lightning_nas.costs import Device, Latency, LatencyTable, MACs, Roofline
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.supernet import default_space, elastic
from tests.costs.networks import NETWORKS, residual, tiny_vit

IMAGES = torch.zeros(1, 3, 8, 8)
DEVICE = Device(1e10, 1e9, 1e-5, "phone")


class Planted:
    """A cost whose numbers a function tells: a device without noise, or with a known one."""

    name, unit = "latency", "ms"
    conditions = {"device": "phone", "shapes": [[1, 3, 8, 8]]}  # noqa: RUF012

    def __init__(self, supernet, function):
        self.supernet, self.function = supernet, function

    def __call__(self, architecture):
        return self.function(architecture)


def some(space, n=50, seed=7):
    rng = np.random.default_rng(seed)
    return [space.sample(rng) for _ in range(n)]


@pytest.mark.parametrize(("name", "networks"), [("vit", 14), ("bert", 10), ("resnet", 25)])
def test_the_table_of_a_device_that_takes_its_time_by_operations_is_exact(name, networks):
    supernet, inputs = NETWORKS[name]()
    with supernet.paused() as model:
        ends = {c.name: (c.values[0], c.values[-1]) for c in supernet.space if len(c.values) > 1}
        supernet.release()
        supernet = Supernet(model, supernet.space.restrict(ends))
    roofline = Roofline(
        supernet, inputs, DEVICE
    )  # no sum of MACs and bytes: each operation has its own bound
    table = LatencyTable.measure(roofline, networks, check=5)
    assert table.error.networks == 5
    assert table.error.mape < 1e-9
    assert abs(table.error.drift) < 1e-9
    architectures = some(supernet.space, 5)
    expected = [roofline(architecture) for architecture in architectures]
    np.testing.assert_allclose(table.many(architectures), expected, rtol=1e-9)
    assert table(architectures[0]) == table.many(architectures)[0]


def test_the_table_of_measured_latencies_follows_a_device_with_steps(monkeypatch):
    now, plain = [0.0], nn.Linear.forward

    def slow(self, x):  # as many steps of 8 by 8 as it takes to cover the weight
        rows, columns = self.weight.shape
        now[0] += 1e-4 * -(-rows // 8) * -(-columns // 8)
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", slow)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    model = tiny_vit()
    supernet = Supernet(model, default_space(model, heads=(1, 2, 3), mlp=(9, 12, 17, 48), embed=(8, 9, 12)))
    latency = Latency(supernet, IMAGES, isolated=False, warmup=0, repeats=1)
    table = LatencyTable.measure(latency, check=10)
    architectures = some(supernet.space)
    expected = [latency(architecture) for architecture in architectures]
    np.testing.assert_allclose(table.many(architectures), expected, rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_two_percent_leaves_the_order_of_random_networks(seed):
    # 50 networks whose times differ by some 13 %: measured ones agree with true ones to a rank correlation of
    # about 1 / sqrt(1 + (2 / 13)^2) = 0.988, and a table is off by less than a single measurement is
    supernet = Supernet(tiny_vit(depth=6))
    macs, rng = MACs(supernet, IMAGES), np.random.default_rng(seed)
    noisy = Planted(supernet, lambda a: macs(a) * 1e-6 * (1 + 0.02 * rng.standard_normal()))
    table = LatencyTable.measure(noisy, seed=seed)
    assert table.error.spearman >= 0.95
    assert table.error.mape < 0.03
    architectures = some(supernet.space)
    true = macs.many(architectures) * 1e-6
    assert np.std(true) / np.mean(true) > 0.1
    assert np.abs(table.many(architectures) / true - 1).mean() < 0.02


def test_blocks_that_can_only_be_left_out_have_entries_too():
    blocks = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(6))
    model = nn.Sequential(nn.Linear(4, 4), elastic(nn.Sequential(*blocks), depth=(1, 2, 3, 5, 6)))
    supernet = Supernet(model)
    depths = [supernet.space.architecture({"1.depth": depth}) for depth in (1, 2, 3, 5, 6)]
    cost = Planted(supernet, lambda architecture: 7.0 + 3 * architecture["1.depth"])
    table = LatencyTable.measure(cost, networks=2, check=3)
    np.testing.assert_allclose(table.many(depths), [10, 13, 16, 22, 25])


def test_a_device_that_becomes_warm_is_told():
    supernet = Supernet(tiny_vit())
    macs, calls = MACs(supernet, IMAGES), []

    def warming(architecture):
        calls.append(architecture)
        return macs(architecture) * (1 + len(calls) / 100)

    drift = LatencyTable.measure(Planted(supernet, warming), networks=60, check=40).error.drift
    assert 0.5 < drift < 0.8  # from 1.01 to 2.00 times: 1, relative to what the table says, some 1.5 times


def test_equal_networks_have_equal_predictions_and_blocks_built_alike_equal_entries():
    supernet = Supernet(tiny_vit())
    table = LatencyTable.measure(Planted(supernet, MACs(supernet, IMAGES)), check=4)
    shallow = supernet.space.architecture({"depth": 3})
    (dropped,) = set(range(4)) - set(supernet.fit.kept(shallow))
    other = supernet.space.architecture({"depth": 3, f"layers.{dropped}.mlp": 12})
    assert table(other) == table(shallow)
    assert {entry.split()[0] for entry in table.entries if " " in entry} == {"blocks.0"}


@pytest.fixture
def saved(tmp_path):
    supernet = Supernet(tiny_vit())
    table = LatencyTable.measure(Planted(supernet, MACs(supernet, IMAGES)), check=4)
    return table, table.save(tmp_path / "table.json")


def test_a_saved_table_says_the_same_elsewhere(saved):
    table, path = saved
    supernet = Supernet(tiny_vit())
    loaded = LatencyTable.load(path, supernet, example_inputs=torch.zeros(8, 3, 8, 8), device="phone")
    architectures = some(supernet.space)
    assert np.array_equal(loaded.many(architectures), table.many(architectures))
    assert (loaded.error, loaded.conditions, loaded.name, loaded.unit) == (
        table.error, table.conditions, "latency", "ms"
    )  # fmt: skip


def test_a_table_serves_a_part_of_its_space(saved):
    table, path = saved
    model = tiny_vit()
    part = default_space(model).restrict({"depth": (4,), "layers.1.mlp": (12, 48)})
    loaded = LatencyTable.load(path, Supernet(model, part))
    architectures = some(part)
    assert np.array_equal(loaded.many(architectures), table.many(architectures))


def refused(path, supernet, **expected):
    with pytest.raises(ValueError, match=r"^LatencyTable.load: ") as error:
        LatencyTable.load(path, supernet, **expected)
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_table_of_something_else_is_refused_with_both_named(saved):
    _, path = saved
    assert "measured on 'phone', not on 'H100'" in refused(path, Supernet(tiny_vit()), device="H100")
    here, other = tiny_vit(), tiny_vit(embed_dim=24)
    message = refused(path, Supernet(other))
    for model in (here, other):
        assert f"VisionTransformer of {sum(p.numel() for p in model.parameters()):,} parameters" in message
    message = refused(path, Supernet(tiny_vit()), example_inputs=torch.zeros(1, 3, 16, 16))
    assert "of shape [[1, 3, 8, 8]], and example_inputs are of [[1, 3, 16, 16]]" in message
    other = Supernet(tiny_vit(), SearchSpace([Choice("layers.2.mlp", (7, 48))]))
    message = refused(path, other)
    assert "lacks 1 options" in message
    assert "blocks.0 embed=12 layers.0.mlp=7" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(format="something"), "is no table of this version"),
        (lambda table: table.update(version=99), "is no table of this version"),
        (lambda table: table.pop("entries"), "KeyError: 'entries'"),
        (lambda table: table["error"].update(more=1), "TypeError"),
    ],
)
def test_a_damaged_table_is_refused(saved, change, message):
    _, path = saved
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    assert message in refused(path, Supernet(tiny_vit()))
    path.write_text(path.read_text()[:100])
    assert "JSONDecodeError" in refused(path, Supernet(tiny_vit()))


def test_what_cannot_make_a_table_is_named():
    supernet = Supernet(tiny_vit())
    macs = Planted(supernet, MACs(supernet, IMAGES))
    # a constant, what a block is, 2 more options of heads and 3 of MLPs
    with pytest.raises(ValueError, match=r"networks must be from 7, .* got 6"):
        LatencyTable.measure(macs, networks=6)
    with pytest.raises(ValueError, match=r"check must be at least 2.* got 1"):
        LatencyTable.measure(macs, check=1)
    with pytest.raises(ValueError, match=r"latency must be positive, got nan for \{"):
        LatencyTable.measure(Planted(supernet, lambda architecture: float("nan")))
    with pytest.raises(ValueError, match=r"space of 2 architectures is too small"):
        LatencyTable.measure(Planted(residual(), lambda architecture: 1.0))
