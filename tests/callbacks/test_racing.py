"""Candidates that leave validation early: the same front from fewer batches, and nothing else changed."""

import pytest
import pytorch_lightning as pl
import sklearn.metrics
import torch
import torchmetrics
from lightning_nas.callbacks import InstaTune

import lightning_nas as nas
from tests import user_modules as users
from tests.callbacks.test_supernet_training import QUIET, assert_same, weights

SURE = nas.Racing(error_rate=0.05, front=10)
DATA = users.images(330, 1)  # 41 batches of 8, and one of 2


class Floats(users.PlainClassifier):
    batches = 0

    def validation_step(self, batch, batch_idx):
        type(self).batches += 1
        super().validation_step(batch, batch_idx)


class Objects(users.MetricObjects):
    batches = 0

    def validation_step(self, batch, batch_idx):
        type(self).batches += 1
        super().validation_step(batch, batch_idx)


class AtTheEnd(Floats):
    """Logs its metric when the epoch ends, where no batch can be told from another."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.correct = [*getattr(self, "correct", []), (self(batch[0]).argmax(-1) == batch[1]).float()]

    def on_validation_epoch_end(self):
        self.log("late_acc", torch.cat(self.correct).mean())
        self.correct = []


def run(cls, racing, **settings):
    """A search for small and *inaccurate* networks: of a trained family most are clearly beaten."""
    cls.batches = 0
    torch.manual_seed(0)
    module = cls()
    settings = {"monitor": "val_acc", "mode": "min", "strategy": "random", "budget": 8} | settings
    folder = f"found{racing is None}"
    instatune = InstaTune(racing=racing, warmup=0, validate=(), order=None, folder=folder, **settings)
    trainer = pl.Trainer(callbacks=[instatune], max_epochs=3, **QUIET)
    trainer.fit(module, users.loader(users.images(48)), users.loader(DATA))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return instatune.result, cls.batches, (weights(module), logged, torch.rand(2), module.training)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Floats, Objects])
def test_the_front_is_that_without_racing_from_fewer_batches(cls):
    full, all_batches, ended = run(cls, None)
    fast, batches, ended_too = run(cls, SURE)
    assert [c.architecture for c in fast.front] == [c.architecture for c in full.front]
    by_key = {c.architecture.key: c.values for c in full.candidates}
    saved = 0
    for candidate in fast.candidates:
        share = candidate.values["share"]
        if share < 1:
            saved += 42 - round((share * 330) / 8)
            assert set(candidate.values) == {"val_acc", "share", "macs"}
        else:
            assert candidate.values == {**by_key[candidate.architecture.key], "share": 1.0}
    assert all_batches - batches == saved > 42
    assert_same(ended[0], ended_too[0], rtol=0, atol=0)
    assert ended[1] == ended_too[1]
    assert torch.equal(ended[2], ended_too[2])
    assert ended[3] == ended_too[3]


def test_a_metric_that_comes_at_the_end_of_the_epoch_is_not_raced_by_and_said_so():
    with pytest.warns(UserWarning, match="'late_acc' cannot be raced by: validation_step does not log it"):
        fast = run(AtTheEnd, SURE, monitor="late_acc", budget=3)[0]
    assert all(c.values["share"] == 1.0 for c in fast.candidates)


@pytest.mark.slow
def test_a_score_that_is_no_mean_over_samples_is_that_of_the_extracted_network():
    class F1(users.MetricObjects):
        batches = 0

        def __init__(self):
            super().__init__()
            self.accuracies["of_val"] = torchmetrics.F1Score("multiclass", num_classes=3, average="macro")

    module = F1()
    instatune = InstaTune(
        mode="min", strategy="random", budget=6, racing=SURE, warmup=0, validate=(), folder="f1"
    )
    pl.Trainer(callbacks=[instatune], max_epochs=3, **QUIET).fit(
        module, users.loader(users.images(48)), users.loader(DATA)
    )
    measured = [c for c in instatune.result.candidates if c.values["share"] == 1.0]
    assert len(measured) >= 2
    for candidate in measured:
        predicted = instatune.extract(candidate).eval()(DATA.tensors[0]).argmax(-1)
        f1 = sklearn.metrics.f1_score(DATA.tensors[1], predicted, average="macro")
        assert candidate.values["val_acc"] == pytest.approx(f1, abs=1e-6)


def test_racing_must_be_settings_of_a_race():
    with pytest.raises(TypeError, match=r"racing must be a nas.Racing\(...\) or None, got True"):
        InstaTune(racing=True)


def test_racing_beside_a_bound_on_a_measured_value_is_refused():
    with pytest.raises(ValueError, match="bound on 'val_loss', which is measured"):
        InstaTune(racing=SURE, constraints={"macs": ("<=", 1e5), "val_loss": ("<=", 1.0)})
    InstaTune(constraints={"val_loss": ("<=", 1.0)})
    InstaTune(racing=SURE, constraints={"macs": ("<=", 1e5)})
