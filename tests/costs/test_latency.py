from __future__ import annotations

import gc
import os
import sys

import pytest
import pytorch_lightning as pl
import timm
import torch
from lightning_nas.callbacks import InstaTune
from torch import nn

from lightning_nas import Supernet
from lightning_nas.costs import Latency, Measurement, Throughput
from lightning_nas.errors import NASError, UnsupportedError
from lightning_nas.supernet import default_space
from tests.costs.networks import residual, tiny_vit
from tests.user_modules import PlainClassifier, loader

IMAGES = torch.zeros(1, 3, 8, 8)
HERE = {"isolated": False, "warmup": 0, "repeats": 1}


@pytest.fixture
def clock(monkeypatch):
    """A device on which a linear layer takes a microsecond an output of each sample, and nothing else any."""
    now = [0.0]
    plain = nn.Linear.forward

    def slow(self, x):
        now[0] += 1e-6 * self.weight.shape[0] * len(x)
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", slow)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


class Notes(nn.ReLU):
    """Notes where and how it runs; fails for a width of 13, and ends its process for one of 14."""

    file = None

    def forward(self, x):
        if x.shape[-1] == 14:
            os._exit(3)
        if x.shape[-1] == 13:
            raise ValueError("boom")
        sys.stdout.write("something that is no answer\n")
        with open(self.file, "a") as file:
            note = os.getpid(), torch.get_num_threads(), torch.is_inference_mode_enabled(), self.training
            file.write(" ".join(map(str, note)) + "\n")
        return super().forward(x)


def noting(file) -> Supernet:
    model = tiny_vit(act_layer=Notes, depth=1).train()
    model.blocks[0].mlp.act.file = str(file)
    return Supernet(model, default_space(model, heads=(), mlp=(12, 13, 14, 24, 48), depth=()))


def hidden(units):
    return {"layers.0.mlp": units}


def test_latency_is_that_of_the_extracted_network(clock):
    supernet = residual()
    latency = Latency(supernet, torch.zeros(1, 5, 4), **HERE)
    assert latency({"up.out": 8}) == pytest.approx(1e-3 * (8 + 4))
    assert latency({"up.out": 2}) == pytest.approx(1e-3 * (2 + 4))
    assert (latency.name, latency.unit) == ("latency", "ms")
    assert supernet.active == supernet.space.largest


def test_the_median_and_quartiles_of_passes_behind_the_warmup_count(clock):
    class Slower(nn.ReLU):
        passes = 0

        def forward(self, x):
            self.passes += 1
            clock[0] += self.passes
            return x

    supernet = residual(act=Slower())
    latency = Latency(supernet, torch.zeros(1, 5, 4), isolated=False, warmup=2, repeats=4)
    measured = latency.measurement(supernet.space.smallest)
    linear = 1e-3 * (2 + 4)
    expected = Measurement(
        4.5e3 + linear, 3.75e3 + linear, 5.25e3 + linear, 4
    )  # passes of 3, 4, 5, 6 seconds
    assert measured.repeats == 4
    for name in ("median", "lower", "upper"):
        assert getattr(measured, name) == pytest.approx(getattr(expected, name))


def test_equal_networks_are_measured_once(clock):
    supernet = Supernet(tiny_vit())
    latency = Latency(supernet, IMAGES, **HERE)
    shallow = supernet.space.architecture({"depth": 3})
    (dropped,) = set(range(4)) - set(supernet.fit.kept(shallow))
    other = supernet.space.architecture({"depth": 3, f"layers.{dropped}.mlp": 12})
    first, before = latency(shallow), clock[0]
    assert latency(other) == first
    assert clock[0] == before


def test_a_batch_is_filled_with_the_first_sample_and_throughput_counts_samples(clock):
    supernet = Supernet(tiny_vit())
    one, eight = (Latency(supernet, {"x": IMAGES}, size, **HERE) for size in (1, 8))
    largest = supernet.space.largest
    assert eight(largest) == pytest.approx(8 * one(largest))
    assert eight.conditions["shapes"] == [[8, 3, 8, 8]]
    assert Throughput(eight)(largest) == pytest.approx(8 / (1e-3 * eight(largest)))


def test_settings_of_this_process_stay_when_it_measures_itself():
    supernet = Supernet(tiny_vit().train())
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else None
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    Latency(supernet, IMAGES, threads=threads + 1, cores=cores and cores[:1], **HERE)(supernet.space.largest)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert supernet.model.training
    assert cores is None or sorted(os.sched_getaffinity(0)) == cores


@pytest.mark.slow
def test_networks_are_measured_in_one_process_of_their_own_that_may_die(tmp_path):
    supernet = noting(tmp_path / "notes")
    threads = torch.get_num_threads()
    latency = Latency(supernet, IMAGES, threads=threads + 1, warmup=1, repeats=2)
    assert latency(hidden(48)) > 0
    with pytest.raises(NASError, match=r"failed in the process that times it: ValueError: boom"):
        latency(hidden(13))
    assert latency(hidden(12)) > 0
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert len(notes) == 2 * 3
    assert len({note[0] for note in notes} - {str(os.getpid())}) == 1
    assert {tuple(note[1:]) for note in notes} == {(str(threads + 1), "True", "False")}
    assert torch.get_num_threads() == threads

    with pytest.raises(NASError, match=r"ended with exit code 3"):
        latency(hidden(14))
    assert latency(hidden(24)) > 0
    second = int((tmp_path / "notes").read_text().splitlines()[-1].split()[0])
    os.kill(second, 0)  # is there
    del latency
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_a_network_that_cannot_be_sent_to_another_process_is_refused():
    class Local(nn.ReLU):
        pass

    supernet = residual(act=Local())
    with pytest.raises(NASError, match=r"cannot be sent .*Local.*top of a module, or give isolated=False"):
        Latency(supernet, torch.zeros(1, 5, 4))(supernet.space.largest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"batch_size must be an integer from 1, got 0"),
        ({"threads": 0.5}, r"threads must be an integer from 1, got 0.5"),
        ({"warmup": -1}, r"warmup must be an integer from 0, got -1"),
        ({"repeats": 0}, r"repeats must be an integer from 1, got 0"),
        ({"device": "phone"}, r"no device 'phone' here .*lightning_nas.costs.measure"),
        ({"cores": [10**6]}, r"cores"),
        ({"cores": []}, r"cores"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Latency(residual(), torch.zeros(1, 5, 4), **settings)


def test_what_has_no_values_cannot_be_measured():
    with pytest.raises(ValueError, match=r"tensors on the meta device.*torch.zeros"):
        Latency(residual(), torch.zeros(1, 5, 4, device="meta"))
    with pytest.raises(ValueError, match=r"must hold tensors with values, .*got 'image'"):
        Latency(residual(), "image")
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    with pytest.raises(UnsupportedError, match=r"VisionTransformer is on the meta device"):
        Latency(Supernet(model), torch.zeros(1, 3, 224, 224))


@pytest.mark.slow
def test_a_run_minimises_a_latency_given_by_name(tmp_path):
    instatune = InstaTune(monitor="val_acc", costs=("latency",), budget=3, folder=str(tmp_path / "found"))
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[instatune], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(PlainClassifier(), loader(), loader())
    assert instatune.result.objectives[1].label == "latency [ms]"
    assert all(candidate.values["latency"] > 0 for candidate in instatune.result.candidates)
