"""Reordering heads and units in the middle of a run changes no output and no later step."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SupernetTraining
from pytorch_lightning.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_avg_fn

import lightning_nas as nas
from tests import user_modules as users
from tests.callbacks.test_supernet_training import QUIET, assert_same, fit, weights

SPACE_STEPS = 4


class Recorder(pl.Callback):
    """What the largest network computes, and how it steps, around each batch."""

    def __init__(self):
        self.outputs, self.x = [], users.images(16, seed=4).tensors[0]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.eval()
            self.outputs.append(pl_module.net(self.x.to(next(pl_module.parameters()).dtype)).clone())
            pl_module.train()


class NoStudent:
    """Draws none, so that what remains of the callback is the effect of the ordering."""

    def students(self, space, seed, step, progress):
        return ()


def ordering_only(**settings):
    return SupernetTraining(sampler=NoStudent(), validate=(), **settings)


class Snapshots(pl.Callback):
    """The weights at the start of each batch, as they stand when this callback's turn comes."""

    def __init__(self):
        self.taken = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.taken.append(weights(pl_module.net))


@pytest.mark.parametrize("order", ["importance", "magnitude"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_run_goes_on_as_if_nothing_had_been_permuted(optimizer, order):
    class Module(users.PlainClassifier):
        def configure_optimizers(self):
            if optimizer == "adam":
                return torch.optim.Adam(self.parameters(), lr=1e-3)
            return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9, nesterov=True)

    plain, ours, first, second = Module().double(), Module().double(), Recorder(), Recorder()
    fit(plain, callbacks=[first], max_epochs=3, precision="64-true")
    callback = ordering_only(warmup=SPACE_STEPS, order=order)
    fit(ours, callback, callbacks=[second], max_epochs=3, precision="64-true")
    assert callback.ordered
    before, after = weights(plain), weights(ours)
    assert any(not torch.equal(before[name], after[name]) for name in before)  # it did permute
    for expected, found in zip(first.outputs, second.outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_after_ordering_the_most_important_come_first():
    module, earlier, later = users.PlainClassifier().double(), Snapshots(), Snapshots()
    callback = ordering_only(warmup=SPACE_STEPS)
    trainer = pl.Trainer(callbacks=[earlier, callback, later], max_epochs=2, precision="64-true", **QUIET)
    trainer.fit(module, users.loader())
    assert all(
        torch.equal(a, b) for a, b in zip(earlier.taken[0].values(), later.taken[0].values(), strict=True)
    )
    before, after = earlier.taken[SPACE_STEPS], later.taken[SPACE_STEPS]
    for i in range(3):
        ranks = callback.importance[f"layers.{i}.mlp"].argsort(descending=True)
        name = f"blocks.{i}.mlp.fc1.weight"
        torch.testing.assert_close(after[name], before[name][ranks], rtol=0, atol=0)
        heads = callback.importance[f"layers.{i}.heads"].argsort(descending=True)
        name = f"blocks.{i}.attn.proj.weight"
        torch.testing.assert_close(
            after[name], before[name].view(16, 4, 4)[:, heads].reshape(16, 16), rtol=0, atol=0
        )


def test_importance_is_the_taylor_criterion_of_the_last_warm_up_gradients():
    plain, ours = users.PlainClassifier().double(), users.PlainClassifier().double()
    sums, callback = {}, ordering_only(warmup=SPACE_STEPS)

    class ByHand(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for i, block in enumerate(pl_module.net.blocks):
                for name, weight in (
                    (f"layers.{i}.mlp", block.mlp.fc2.weight),
                    (f"layers.{i}.heads", block.attn.proj.weight),
                ):
                    columns = (weight * weight.grad).sum(0)
                    score = (columns if "mlp" in name else columns.view(4, 4).sum(1)).abs().detach()
                    sums[name] = sums.get(name, 0) + score

    fit(plain, callbacks=[ByHand()], max_steps=SPACE_STEPS, max_epochs=2, precision="64-true")
    fit(ours, callback, max_epochs=2, precision="64-true")
    assert_same(callback.importance, sums, rtol=1e-12, atol=1e-15)


def test_averaged_weights_follow_the_permutation():
    def averaged(callback):
        module = users.PlainClassifier().double()
        ema = WeightAveraging(avg_fn=get_ema_avg_fn(0.5))
        fit(module, callback, callbacks=[ema], max_epochs=3, precision="64-true")
        x = users.images(16, seed=4).tensors[0].double()
        with torch.no_grad():
            return module.eval().net(x)

    expected = averaged(None)
    torch.testing.assert_close(averaged(ordering_only(warmup=SPACE_STEPS)), expected, rtol=0, atol=1e-12)


def test_a_teacher_inside_the_module_keeps_its_function():
    class WithEma(users.PlainClassifier):
        def __init__(self):
            super().__init__()
            self.ema = copy.deepcopy(self.net).requires_grad_(False)

        def on_train_batch_end(self, *args):
            for slow, fast in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                slow.data.lerp_(fast.data, 0.1)

    plain, ours, x = WithEma().double(), WithEma().double(), users.images(16, seed=4).tensors[0].double()
    fit(plain, max_epochs=3, precision="64-true")
    fit(ours, ordering_only(network="net", warmup=SPACE_STEPS), max_epochs=3, precision="64-true")
    with torch.no_grad():
        torch.testing.assert_close(ours.ema.eval()(x), plain.ema.eval()(x), rtol=0, atol=1e-12)


def test_without_warm_up_the_first_batch_gives_the_order_and_leaves_no_trace():
    plain, ours, first, second = (
        users.ScheduledClassifier(),
        users.ScheduledClassifier(),
        Recorder(),
        Recorder(),
    )
    pl.seed_everything(0, verbose=False)
    fit(plain.double(), callbacks=[first], max_epochs=1, precision="64-true")
    pl.seed_everything(0, verbose=False)
    callback = ordering_only(warmup=0)
    fit(ours.double(), callback, callbacks=[second], max_epochs=1, precision="64-true")
    assert callback.ordered
    # Dropout masks fall on permuted units, so only the first output, before the first step, must agree.
    assert len(first.outputs) == len(second.outputs)
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(ours).values(), strict=True)
    )


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Adafactor])
def test_optimizers_whose_state_has_other_shapes_are_refused_for_a_mid_run_order_only(optimizer):
    class Module(users.PlainClassifier):
        def configure_optimizers(self):
            return optimizer(self.parameters(), lr=1e-3)

    module = Module()
    kinds, before = [type(m) for m in module.modules()], weights(module)
    with pytest.raises(nas.UnsupportedError, match=f"{optimizer.__name__}.*order at the start"):
        fit(module, SupernetTraining(warmup=2, validate=()), max_epochs=2)
    assert [type(m) for m in module.modules()] == kinds
    assert_same(weights(module), before, rtol=0, atol=0)
    callback = SupernetTraining(warmup=0, validate=())
    fit(module, callback, max_epochs=1)
    assert callback.ordered
    assert callback.sandwich_steps == 3


def test_ordering_waits_for_the_end_of_an_accumulation_window():
    earlier, later = Snapshots(), Snapshots()
    trainer = pl.Trainer(
        callbacks=[earlier, ordering_only(warmup=1), later], accumulate_grad_batches=3, max_epochs=2, **QUIET
    )
    trainer.fit(users.PlainClassifier(), users.loader(users.images(32)))
    changed = [
        any(not torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(earlier.taken, later.taken, strict=True)
    ]
    assert changed == [
        False,
        False,
        False,
        True,
        False,
        False,
        False,
        False,
    ]  # windows of 3 and of 1 micro-batches
