"""What the callback logs of each role, and the alarms that say what to do next."""

import csv
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SupernetTraining
from pytorch_lightning.loggers import CSVLogger
from torch.nn import functional as F

from tests import user_modules as users
from tests.callbacks.test_supernet_training import QUIET, fit


def logged_by(module, callback, epochs=3):
    logger = CSVLogger("logs", name="", version="0")
    settings = {**QUIET, "logger": logger, "log_every_n_steps": 1, "max_epochs": epochs}
    trainer = pl.Trainer(callbacks=[callback], **settings)
    trainer.fit(module, users.loader(), users.loader(users.images(48, 1), 16))
    return list(csv.DictReader(Path("logs/0/metrics.csv").open()))


@pytest.mark.filterwarnings("ignore:.*for the second time")  # on 48 images that is chance
def test_each_roles_validation_is_logged_and_is_that_of_its_network():
    module, callback = users.PlainClassifier(), SupernetTraining(warmup=3, seed=4)
    rows = logged_by(module, callback)
    values = [row for row in rows if row.get("val_acc/smallest")]
    assert [int(row["step"]) for row in values] == [
        6,
        9,
    ]  # the epochs of the sandwich, not that of the warm-up
    x, y = users.images(48, 1).tensors
    supernet = callback.supernet
    for role, architecture in (("largest", supernet.space.largest), ("smallest", supernet.space.smallest)):
        with torch.no_grad():
            accuracy = (supernet.extract(architecture).eval()(x).argmax(-1) == y).float().mean()
        assert float(values[-1][f"val_acc/{role}"]) == pytest.approx(accuracy.item(), abs=1e-6)
    assert 0 <= float(values[-1]["val_acc/random"]) <= 1


def test_the_training_loss_of_each_role_is_logged_and_kept():
    @dataclass(frozen=True)
    class OnlySmallest:
        def students(self, space, seed, step, progress):
            return (space.smallest,)

    class Watched(users.PlainClassifier):
        expected: list

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.net.blocks[0].attn.num_heads == 4:
                self.expected.append(loss.item())
            return loss

    Watched.expected = []
    callback = SupernetTraining(
        sampler=OnlySmallest(), warmup=0, order=None, students_learn_from="task", validate=()
    )
    rows = logged_by(Watched(), callback, epochs=1)
    logged = [row for row in rows if row.get("supernet_loss/smallest")]
    assert [float(row["supernet_loss/largest"]) for row in logged] == pytest.approx(Watched.expected)
    assert callback.curves["largest"] == [
        (step, pytest.approx(loss)) for step, loss in zip((1, 2, 3), Watched.expected, strict=True)
    ]
    assert set(callback.curves) == {"largest", "smallest"}


def test_an_alarm_says_when_the_smallest_is_better_than_the_largest_twice_in_a_row():
    class Odd(users.PlainClassifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 1.0 / self.net.blocks[0].attn.num_heads)

    with pytest.warns(
        UserWarning, match=r"val_acc of the smallest network \(1\).*largest \(0.25\).*lengthen warmup"
    ):
        logged_by(Odd(), SupernetTraining(warmup=0))


def test_an_alarm_says_which_options_were_never_trained():
    @dataclass(frozen=True)
    class Stuck:
        def students(self, space, seed, step, progress):
            return (space.smallest,)

    with pytest.warns(
        UserWarning, match=r"never trained in 21 sandwich steps: depth=3, layers.0.heads=2, .* restrict"
    ):
        fit(users.PlainClassifier(), SupernetTraining(sampler=Stuck(), warmup=0, validate=()), max_epochs=7)


@pytest.mark.parametrize("growth", [3.0, float("nan")])
def test_an_alarm_says_when_students_diverge(growth):
    class Grows:
        needs_task = False
        needs_teacher = True
        calls = 0

        def __call__(self, student, teacher, *, task, strong, features):
            self.calls += 1
            loss = F.mse_loss(student, teacher)
            return loss * 0 + 1.0 + (growth if self.calls > 3 else 0.0)

    callback = SupernetTraining(
        sampler="random", students_learn_from=Grows(), warmup=0, order=None, validate=()
    )
    with pytest.warns(
        UserWarning, match="students diverge: the loss of the random subnetworks is .* Lower lr_factor"
    ):
        fit(users.PlainClassifier(), callback, max_epochs=2, log_every_n_steps=1)


def test_the_first_lines_say_what_will_happen_and_that_the_largest_network_is_the_users(caplog):
    with caplog.at_level("INFO", "pytorch_lightning.utilities.rank_zero"):
        fit(users.PlainClassifier(), SupernetTraining(warmup=1, lr_factor=3, validate=()), max_epochs=1)
    said = " ".join(caplog.messages)
    assert "4,352 architectures. 1 steps of warm-up, then 2 of sandwich at 3 times the scheduled" in said
    assert "compared by logits" in said
    assert "the largest network equals yours bit for bit" in said
    caplog.clear()
    with caplog.at_level("INFO", "pytorch_lightning.utilities.rank_zero"):
        fit(users.NestedFeatures(), SupernetTraining(warmup=1, validate=()), max_epochs=1)
    assert "compared by features (normalised squared distance)" in " ".join(caplog.messages)
