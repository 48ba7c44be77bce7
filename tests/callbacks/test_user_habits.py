"""Habits of users' code that a second pass over the same batch must survive."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import InstaTune, SupernetTraining
from torch.nn import functional as F

from tests import user_modules as users
from tests.callbacks.test_supernet_training import AT_ONCE, QUIET, assert_same, fit, weights


class PopsAndShifts(users.DictBatches):
    """Takes the labels out of the batch, and normalises the images in place."""

    means: list

    def training_step(self, batch, batch_idx):
        labels = batch.pop("label")
        batch["image"].sub_(1.0)
        self.means.append(batch["image"].mean().item())
        return F.cross_entropy(self.backbone(x=batch["image"]), labels)


@pytest.mark.parametrize("order", [None, "importance"])
def test_each_pass_gets_the_batch_as_the_loader_gave_it(order):
    PopsAndShifts.means = []
    callback = SupernetTraining(warmup=0, order=order, students_learn_from="task", validate=())
    fit(PopsAndShifts(), callback, users.loader(users.DictImages()), max_epochs=1)
    expected = [batch["image"].mean().item() - 1.0 for batch in users.loader(users.DictImages())]
    passes = [3 + (order is not None), 3, 3]  # the largest and two students; at first the importance too
    assert PopsAndShifts.means == pytest.approx(
        [mean for mean, count in zip(expected, passes, strict=True) for _ in range(count)], abs=1e-6
    )


class InTwoParts(users.PlainClassifier):
    """Runs the network by its parts, as timm's documentation does."""

    def forward(self, x):
        return self.net.forward_head(self.net.forward_features(x))


def test_a_network_run_by_its_parts_is_told_to_be_called_itself():
    with pytest.warns(
        UserWarning, match=r"did not run the network as network\(...\).*students_learn_from='task'"
    ):
        fit(InTwoParts(), SupernetTraining(**AT_ONCE), max_epochs=1)


def test_students_of_the_task_need_no_output_that_can_be_compared():
    ours, hand = InTwoParts().double(), users.PlainClassifier().double()
    settings = {"sampler": "sandwich", "students_learn_from": "task", **AT_ONCE}
    for module in (ours, hand):
        fit(module, SupernetTraining(**settings), precision="64-true", max_epochs=1)
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-12)


def test_an_average_kept_as_a_dictionary_follows_the_order():
    class Averages(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.shadow = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step:
                now = dict(pl_module.named_parameters())
                self.equal = all(torch.equal(self.shadow[name], now[name]) for name in now)
                assert self.equal, f"the copy differs at step {trainer.global_step}"

    ours, averages = SupernetTraining(warmup=3, validate=()), Averages()
    trainer = pl.Trainer(callbacks=[ours, averages], max_epochs=2, **QUIET)
    trainer.fit(users.PlainClassifier(), users.loader())
    assert ours.ordered
    assert averages.equal


def test_a_strong_teacher_follows_the_precision_of_the_run():
    from lightning_nas import InstaTuneLoss

    rule = InstaTuneLoss(strong_teacher=users.tiny_vit(seed=3))
    callback = SupernetTraining(sampler="random", students_learn_from=rule, **AT_ONCE)
    fit(users.PlainClassifier(), callback, precision="64-true", max_epochs=1)
    assert callback.sandwich_steps == 3


def test_a_longer_resumed_run_does_not_go_back_into_the_warm_up():
    keep = pl.callbacks.ModelCheckpoint(
        dirpath="kept", filename="{step}", every_n_train_steps=5, save_top_k=-1
    )
    settings = {**QUIET, "enable_checkpointing": True}
    first = SupernetTraining(warmup=0.5, validate=())
    pl.Trainer(callbacks=[keep, first], max_epochs=2, **settings).fit(users.PlainClassifier(), users.loader())
    assert first.phases.warmup_steps == 3
    longer = SupernetTraining(warmup=0.5, validate=())
    pl.Trainer(callbacks=[longer], max_epochs=4, **settings).fit(
        users.PlainClassifier(), users.loader(), ckpt_path="kept/step=5.ckpt", weights_only=False
    )
    assert longer.phases.warmup_steps == 3
    assert longer.sandwich_steps == 12 - 3


def test_a_bound_on_a_cost_that_is_no_objective_is_counted_and_a_metric_of_a_costs_name_is_left_out():
    class LogsParams(users.PlainClassifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("params", 1.0)

    instatune = InstaTune(
        budget=4, warmup=2, validate=(), folder="found", constraints={"params": ("<=", 4_000)}
    )
    pl.Trainer(callbacks=[instatune], max_epochs=2, **QUIET).fit(
        LogsParams(), users.loader(), users.loader(users.images(24, 1))
    )
    for candidate in instatune.result.front:
        network = instatune.extract(candidate)
        assert candidate.values["params"] == sum(p.numel() for p in network.parameters()) <= 4_000
