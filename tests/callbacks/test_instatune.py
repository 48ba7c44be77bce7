"""The search at the end of a run: what it measures, with which weights, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import InstaTune
from pytorch_lightning.callbacks import WeightAveraging
from torch.utils.flop_counter import FlopCounterMode

import lightning_nas as nas
from tests import user_modules as users
from tests.callbacks.test_supernet_training import QUIET, assert_same, weights

ROOT = Path(__file__).parents[2]


def searched(module=None, callbacks=(), epochs=2, **settings):
    module = users.PlainClassifier() if module is None else module
    common = {"budget": 6, "warmup": 2, "validate": (), "folder": "found", "remeasure": 0}
    instatune = InstaTune(**{**common, **settings})
    trainer = pl.Trainer(callbacks=[instatune, *callbacks], max_epochs=epochs, **QUIET)
    trainer.fit(module, users.loader(users.images(24)), users.loader(users.images(48, 1), 16))
    return module, instatune


def accuracy(network, count=48, seed=1):
    x, y = users.images(count, seed).tensors
    with torch.no_grad():
        return (network.eval()(x).argmax(-1) == y).float().mean().item()


def test_each_candidates_values_are_those_of_its_extracted_network():
    _, instatune = searched(costs=("macs", "params"))
    assert len(instatune.result.candidates) == 6
    for candidate in instatune.result.candidates:
        network = instatune.extract(candidate)
        assert candidate.values["val_acc"] == pytest.approx(accuracy(network), abs=1e-6)
        assert candidate.values["params"] == sum(p.numel() for p in network.parameters())
        for attention in network.modules():
            if hasattr(attention, "fused_attn"):
                attention.fused_attn = False
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 1, 8, 8))
        assert candidate.values["macs"] == counter.get_total_flops() // 2
    architectures = [candidate.architecture for candidate in instatune.result.candidates]
    space = instatune.supernet.space
    assert space.largest in architectures
    assert space.smallest in architectures
    assert instatune.result.reference.architecture == space.largest


def test_the_front_is_what_no_other_candidate_dominates_cheapest_first():
    _, instatune = searched(budget=12)
    points = [(c.values["macs"], c.values["val_acc"]) for c in instatune.result.candidates]
    by_hand = sorted(
        (m, a) for m, a in points if not any((n <= m and b >= a) and (n < m or b > a) for n, b in points)
    )
    assert [(c.values["macs"], c.values["val_acc"]) for c in instatune.result.front] == by_hand


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_search_measures_the_averaged_weights_that_the_run_ends_with(ours_first):
    averaging = WeightAveraging(avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9))
    instatune = InstaTune(budget=3, warmup=2, validate=(), folder="found")
    callbacks = [instatune, averaging] if ours_first else [averaging, instatune]
    module = users.PlainClassifier()
    pl.Trainer(callbacks=callbacks, max_epochs=3, **QUIET).fit(
        module, users.loader(users.images(24)), users.loader(users.images(48, 1), 16)
    )
    for candidate in instatune.result.candidates:
        assert candidate.values["val_acc"] == pytest.approx(accuracy(instatune.extract(candidate)), abs=1e-6)


def test_the_run_writes_a_study_a_table_the_result_and_a_picture():
    import pandas as pd

    _, instatune = searched()
    assert {path.name for path in Path("found").iterdir()} >= {
        "study.log",
        "candidates.csv",
        "result.json",
        "front.png",
    }
    table = pd.read_csv("found/candidates.csv")
    assert len(table) == 6
    assert table["macs"].tolist() == [c.values["macs"] for c in instatune.result.candidates]
    assert Path("found/front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    stored = json.loads(Path("found/result.json").read_text())
    assert [row["architecture"] for row in stored["candidates"]] == [
        dict(c.architecture) for c in instatune.result.candidates
    ]


def test_the_search_leaves_weights_and_logged_values_of_the_run_alone():
    def run(callback):
        torch.manual_seed(0)
        module = users.MetricAttributes()
        trainer = pl.Trainer(callbacks=[callback] if callback else [], max_epochs=2, **QUIET)
        trainer.fit(
            module, users.loader(), [users.loader(users.images(16, 1)), users.loader(users.images(16, 2))]
        )
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        return weights(module), logged, torch.rand(2), module.training

    plain = run(None)
    ours = run(InstaTune(monitor="val0_acc", budget=4, sampler="largest", order=None, folder="found"))
    assert_same(plain[0], ours[0], rtol=0, atol=0)
    assert plain[1] == ours[1]
    assert torch.equal(plain[2], ours[2])
    assert plain[3] == ours[3]


class Counted(users.PlainClassifier):
    """Writes down how many batches each validation had, where no search puts it back."""

    def on_validation_epoch_start(self):
        COUNTS.append(0)

    def validation_step(self, batch, batch_idx):
        COUNTS[-1] += 1
        return super().validation_step(batch, batch_idx)


COUNTS: list[int] = []


def test_a_validation_that_repeats_itself_is_repeated_for_two_of_the_front_and_the_summary_says_so():
    COUNTS.clear()
    _, instatune = searched(Counted(), budget=8, remeasure=1, baseline=True)
    result = instatune.result
    # Before: the sanity check, 2 epochs, 1 for the example.
    assert len(COUNTS) - 4 == 8 + min(2, len(result.front)) + 8
    assert len(result.baseline.candidates) == 8
    assert result.noise()["val_acc"].deviation == 0
    written = Path("found/summary.txt").read_text()
    assert written == result.summary() + "\n"
    for line in ("random search", "front measured again"):
        assert line in written


@pytest.mark.parametrize("fits", [True, False])
def test_successive_halving_validates_on_shares_of_the_batches(fits):
    COUNTS.clear()
    settings = {"strategy": nas.strategies.SuccessiveHalving(steps=2), "budget": 5}
    module, instatune = searched(Counted(), **settings)
    counted = COUNTS[4:]  # the sanity check, 2 epochs, 1 for the example
    if not fits:
        COUNTS.clear()
        instatune.search(
            pl.Trainer(**QUIET), module, dataloaders=users.loader(users.images(48, 1), 16), folder="again"
        )
        counted = COUNTS[2:]  # Lightning's own, 1 for the example
    assert counted[:2] == [3, 3]  # the largest and the smallest, whole
    assert set(counted) == {1, 3}  # one of three batches, or all
    assert counted.count(3) + counted.count(1) / 3 <= 5
    assert len(instatune.result.candidates) == counted.count(3)


def test_a_share_of_data_without_a_length_is_refused():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(users.images(48, 1))

    module = users.PlainClassifier()
    instatune = InstaTune(budget=5, warmup=2, folder="found", strategy="successive-halving")
    data = torch.utils.data.DataLoader(Endless(), 16)
    with pytest.raises(nas.UnsupportedError, match="its length is unknown"):
        pl.Trainer(callbacks=[instatune], max_epochs=1, **QUIET).fit(module, users.loader(), data)


def test_constraints_hold_and_several_loaders_and_a_minimised_metric_work():
    _, instatune = searched(
        monitor="val_loss", mode="min", constraints={"macs": ("<=", 12_000)}, costs=("macs",)
    )
    smallest_cost = min(c.values["macs"] for c in instatune.result.candidates)
    assert smallest_cost <= 12_000
    assert all(c.values["macs"] <= 12_000 for c in instatune.result.front)
    best = instatune.result.best("val_loss")
    assert best.values["val_loss"] == min(c.values["val_loss"] for c in instatune.result.feasible)


def test_a_second_search_of_the_same_weights_continues_and_of_others_begins_anew():
    class Counting(users.PlainClassifier):
        validations = 0

        def on_validation_epoch_start(self):
            Counting.validations += 1

    module, instatune = searched(Counting())
    first = instatune.result
    Counting.validations = 0
    again = instatune.search(
        pl.Trainer(**QUIET), module, dataloaders=users.loader(users.images(48, 1), 16), budget=8
    )
    assert [c.architecture for c in again.candidates[:6]] == [c.architecture for c in first.candidates]
    assert Counting.validations == 1 + 1 + 2  # Lightning's own, the example's, and the two new candidates
    with torch.no_grad():
        module.net.head.bias += 0.1
    Counting.validations = 0
    other = instatune.search(pl.Trainer(**QUIET), module, dataloaders=users.loader(users.images(48, 1), 16))
    assert Counting.validations == 1 + 1 + 6
    for candidate in other.candidates:
        assert candidate.values["val_acc"] == pytest.approx(accuracy(instatune.extract(candidate)), abs=1e-6)


def test_a_plainly_trained_module_is_searched_without_reordering_it():
    module = users.PlainClassifier()
    pl.Trainer(max_epochs=2, **QUIET).fit(module, users.loader())
    before = weights(module)
    instatune = InstaTune(budget=4, strategy="random", folder="found")
    result = instatune.search(pl.Trainer(**QUIET), module, dataloaders=users.loader(users.images(48, 1), 16))
    assert_same(weights(module), before, rtol=0, atol=0)
    assert len(result.candidates) == 4
    reference = result.reference
    assert reference.values["val_acc"] == pytest.approx(accuracy(module.net), abs=1e-6)


def test_equal_seeds_give_equal_runs_and_others_do_not():
    fronts = [
        [(c.architecture, c.values) for c in searched(seed=seed, folder=f"found{i}")[1].result.candidates]
        for i, seed in enumerate((1, 1, 2))
    ]
    assert fronts[0] == fronts[1]
    assert fronts[0] != fronts[2]


def test_a_candidate_whose_metric_is_not_a_number_is_recorded_and_the_search_goes_on():
    class SometimesNaN(users.PlainClassifier):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            accuracy = (self(x).argmax(-1) == y).float().mean()
            is_smallest = self.net.blocks[0].attn.num_heads == 1
            self.log("val_acc", accuracy * float("nan") if is_smallest else accuracy)

    _, instatune = searched(SometimesNaN(), budget=8)
    assert instatune.result.failed
    assert all("val_acc is nan" in failure.reason for failure in instatune.result.failed)
    assert len(instatune.result.candidates) + len(instatune.result.failed) == 8


def test_a_monitor_that_was_never_logged_lists_what_was():
    with pytest.raises(ValueError, match=r"monitor='val_accuracy' was not logged.*Did you mean 'val_acc'"):
        searched(monitor="val_accuracy")
    module = users.PlainClassifier()
    with pytest.raises(ValueError, match=r"monitor='top1' was not logged.*'val_acc'"):
        InstaTune(monitor="top1").search(pl.Trainer(**QUIET), module, dataloaders=users.loader())


class Unlogged(users.PlainClassifier):
    """Validates only where ``logs`` says so, and counts its steps."""

    def __init__(self, logs):
        super().__init__()
        self.logs, self.steps = logs, 0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.steps += 1

    def validation_step(self, batch, batch_idx):
        if self.logs(self.trainer):
            super().validation_step(batch, batch_idx)


def fitted(module, sanity_steps, monitor="val_acc"):
    instatune = InstaTune(monitor, budget=2, warmup=0, validate=(), folder="found")
    settings = {**QUIET, "num_sanity_val_steps": sanity_steps}
    trainer = pl.Trainer(callbacks=[instatune], max_epochs=2, **settings)
    trainer.fit(module, users.loader(users.images(24)), users.loader(users.images(48, 1), 16))
    return instatune


@pytest.mark.parametrize(("sanity_steps", "steps"), [(1, 0), (0, 3)])
def test_a_monitor_that_is_not_logged_is_named_before_the_first_step_where_sanity_is_checked(
    sanity_steps, steps
):
    module = Unlogged(lambda trainer: True)
    before, kinds = weights(module), [type(child) for child in module.modules()]
    with pytest.raises(ValueError, match=r"monitor='top1' was not logged.*Known: .*'val_acc', 'val_loss'\."):
        fitted(module, sanity_steps, "top1")
    assert module.steps == steps
    assert [type(child) for child in module.modules()] == kinds
    if sanity_steps:
        assert_same(weights(module), before, rtol=0, atol=0)


def test_a_module_that_logs_nothing_while_sanity_is_checked_is_searched():
    assert len(fitted(Unlogged(lambda trainer: not trainer.sanity_checking), 1).result.candidates) == 2


def test_without_validation_data_the_callback_refuses_before_anything_changes():
    module = users.PlainClassifier()
    kinds = [type(child) for child in module.modules()]
    with pytest.raises(nas.UnsupportedError, match=r"val_acc.*val_dataloaders"):
        pl.Trainer(callbacks=[InstaTune()], max_epochs=1, **QUIET).fit(module, users.loader())
    assert [type(child) for child in module.modules()] == kinds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget must be at least 1 candidate, got 0"),
        ({"mode": "maximum"}, "mode must be 'max' or 'min', got 'maximum'"),
        ({"costs": ("mac",)}, "unknown cost 'mac'. Did you mean 'macs'"),
        ({"strategy": "nsga22"}, "Unknown strategy 'nsga22'. Did you mean 'nsga2'"),
        ({"constraints": {"macs": 2e8}}, "macs.*needs an operator and a number"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        InstaTune(**settings)


PROGRAM = """
import os, signal, sys, warnings
import pytorch_lightning as pl
from lightning_nas.callbacks import InstaTune
from tests import user_modules as users
from tests.callbacks.test_supernet_training import QUIET

class Killed(users.PlainClassifier):
    validations = 0
    def on_validation_epoch_start(self):
        Killed.validations += 1
        if self.trainer.global_step and Killed.validations == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)

module = Killed()
instatune = InstaTune(budget=8, warmup=2, validate=(), folder="found", remeasure=0)
pl.Trainer(callbacks=[instatune], max_epochs=2, num_sanity_val_steps=0, **QUIET).fit(
    module, users.loader(), users.loader(users.images(48, 1), 16)
)
print(Killed.validations, [c.architecture.key for c in instatune.result.candidates])
"""


@pytest.mark.slow
def test_a_search_killed_in_the_middle_resumes_where_it_was(tmp_path):
    def run(kill_at):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(kill_at)],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    # Validations: 2 of the epochs, 1 for the example, then the candidates: the seventh is the fourth of them.
    assert run(7).returncode == -signal.SIGKILL
    resumed = run(0)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    count, _, keys = resumed.stdout.strip().splitlines()[-1].partition(" ")
    assert int(count) == 2 + 1 + (8 - 3)  # three candidates were finished and are not measured again
    (tmp_path / "found").rename(tmp_path / "interrupted")
    whole = run(0).stdout.strip().splitlines()[-1].partition(" ")
    assert whole[0] == str(2 + 1 + 8)
    assert keys == whole[2]
