"""Each use of what Lightning does not document as public: a test that fails when Lightning changes it."""

from __future__ import annotations

import copy
import inspect
import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks._lightning import (
    accumulates,
    can_validate,
    end_validation,
    finds_unused_parameters,
    has_static_graph,
    run_validation,
    sum_so_far,
    syncs_batch_norm,
    takes_batch_idx,
)
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from pytorch_lightning.strategies import DDPStrategy
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_avg_fn

from tests import user_modules as users
from tests.callbacks.test_supernet_training import QUIET
from tests.callbacks.test_user_modules import Memory

ACCURACY, LOSS = "val_acc", "val_loss"


class Once(pl.Callback):
    """Does something with the trainer at one moment of a run."""

    def __init__(self, action, hook="on_train_batch_start", step=1):
        self.step, self.result = step, None

        def act(trainer, pl_module, *args):
            if trainer.global_step == self.step and self.result is None:
                self.result = action(trainer, pl_module)

        setattr(self, hook, act)


def trainer_with(*callbacks, **settings):
    return pl.Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 2, **settings})


# --- accumulates


@pytest.mark.parametrize("batches", [6, 7, 8])
def test_accumulates_is_true_exactly_where_no_optimizer_step_follows(batches):
    told, stepped = [], []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before, self.told = pl_module.optimizer_steps, accumulates(trainer)

        def on_after_backward(self, trainer, pl_module):
            assert accumulates(trainer) == self.told  # the same all through a micro-batch

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert accumulates(trainer) == self.told
            told.append(self.told)
            stepped.append(pl_module.optimizer_steps > self.before)

    class Module(users.PlainClassifier):
        optimizer_steps = 0

        def configure_optimizers(self):
            def count(*args):
                self.optimizer_steps += 1

            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(count)
            return optimizer

    data = users.loader(users.images(8 * batches))
    trainer_with(Watch(), accumulate_grad_batches=3).fit(Module(), data)
    assert told == [not step for step in stepped]
    assert sum(stepped) == 2 * -(-batches // 3)  # a ragged end steps too


# --- can_validate


@pytest.mark.parametrize(
    ("validation", "settings", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"limit_val_batches": 0}, False),
        (True, {"limit_val_batches": 1}, True),
    ],
)
def test_can_validate_knows_whether_fit_would_validate(validation, settings, expected):
    answers, validated = [], []

    class Watch(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            answers.append(can_validate(trainer))

        def on_validation_end(self, trainer, pl_module):
            validated.append(True)

    data = [users.loader()] * (1 + validation)
    trainer_with(Watch(), max_epochs=1, **settings).fit(users.PlainClassifier(), *data)
    assert answers == [expected] == [bool(validated)]


def test_can_validate_sees_a_missing_validation_step_and_the_loaders_of_data_and_of_the_module():
    class WithoutStep(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0].mean().view(1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class OwnLoaders(users.PlainClassifier):
        def train_dataloader(self):
            return users.loader()

        val_dataloader = train_dataloader

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return users.loader()

        val_dataloader = train_dataloader

    def answer(module, *data, **keywords):
        answers = []

        class Watch(pl.Callback):
            def setup(self, trainer, pl_module, stage):
                answers.append(can_validate(trainer))

        trainer_with(Watch(), max_epochs=1).fit(module, *data, **keywords)
        return answers

    assert answer(WithoutStep(), users.loader(), users.loader()) == [False]
    assert answer(OwnLoaders()) == [True]
    assert answer(users.PlainClassifier(), datamodule=Data()) == [True]


# --- has_static_graph


def test_has_static_graph_reads_what_ddp_was_given():
    assert has_static_graph(
        trainer_with(strategy=DDPStrategy(process_group_backend="gloo", static_graph=True))
    )
    assert not has_static_graph(trainer_with(strategy=DDPStrategy(process_group_backend="gloo")))
    assert not has_static_graph(trainer_with(strategy=DDPStrategy(static_graph=False)))
    assert not has_static_graph(trainer_with())


# --- finds_unused_parameters


def test_finds_unused_parameters_reads_what_ddp_was_given():
    assert finds_unused_parameters(trainer_with())
    assert finds_unused_parameters(trainer_with(strategy="ddp_find_unused_parameters_true"))
    assert not finds_unused_parameters(trainer_with(strategy="ddp"))
    assert not finds_unused_parameters(trainer_with(strategy=DDPStrategy(process_group_backend="gloo")))


# --- syncs_batch_norm


def test_syncs_batch_norm_reads_what_the_trainer_was_given():
    assert syncs_batch_norm(trainer_with(strategy="ddp", sync_batchnorm=True))
    assert not syncs_batch_norm(trainer_with(strategy="ddp"))
    assert not syncs_batch_norm(trainer_with())


# --- takes_batch_idx


def training_steps():
    def batch_only(self, batch): ...
    def with_index(self, batch, batch_idx): ...
    def other_names(self, data, i): ...
    def anything(self, *args): ...
    def keywords(self, batch, **kwargs): ...

    return [batch_only, with_index, other_names, anything, keywords]


@pytest.mark.parametrize("step", training_steps(), ids=lambda step: step.__name__)
def test_takes_batch_idx_agrees_with_what_lightning_passes(step):
    given = []

    def body(self, *args, **kwargs):
        given.append(len(args) + len(kwargs))
        return F.cross_entropy(self(users.images().tensors[0][:8]), users.images().tensors[1][:8])

    class Module(users.PlainClassifier):
        def training_step(self, *args, **kwargs):
            return body(self, *args, **kwargs)

    Module.training_step.__signature__ = inspect.signature(step)
    module = Module()
    trainer_with(max_epochs=1, limit_train_batches=1).fit(module, users.loader())
    assert given == [2 if takes_batch_idx(module) else 1]


# --- run_validation


def independently(module, data):
    """The means that Lightning logs, weighted by batch size."""
    module = copy.deepcopy(module).eval()
    correct, loss, count = 0.0, 0.0, 0
    with torch.no_grad():
        for x, y in data:
            logits = module.net(x)
            correct += (logits.argmax(-1) == y).sum().item()
            loss += F.cross_entropy(logits, y, reduction="sum").item()
            count += len(y)
    return {ACCURACY: correct / count, LOSS: loss / count}


def ragged():
    return users.loader(users.images(20, seed=3))  # 8, 8 and 4 images


@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_train_end"]
)
def test_run_validation_equals_an_independent_evaluation(hook):
    def both(trainer, pl_module):
        return run_validation(trainer), independently(pl_module, ragged())

    step = {"on_train_epoch_end": 3, "on_train_end": 6}.get(hook, 2)
    once = Once(both, hook, step)
    trainer_with(once).fit(users.ScheduledClassifier(), users.loader(), ragged())
    found, expected = once.result
    assert found == pytest.approx(expected, rel=1e-5)


def test_run_validation_works_where_no_validation_has_been_run_yet():
    once = Once(
        lambda trainer, module: (run_validation(trainer), independently(module, ragged())), "on_train_end", 3
    )
    trainer_with(once, max_epochs=1, check_val_every_n_epoch=5).fit(
        users.PlainClassifier(), users.loader(), ragged()
    )
    assert once.result[0] == pytest.approx(once.result[1], rel=1e-5)


def test_run_validation_obeys_limit_val_batches():
    once = Once(lambda trainer, module: (run_validation(trainer), module))
    trainer_with(once, limit_val_batches=1, max_steps=2).fit(
        users.PlainClassifier(), users.loader(), ragged()
    )
    first_batch = [next(iter(ragged()))]
    module = users.PlainClassifier()
    trainer_with(max_steps=1).fit(module, users.loader())  # the weights that the run had at step 1
    assert once.result[0] == pytest.approx(independently(module, first_batch), rel=1e-5)


def test_run_validation_works_inside_trainer_validate():
    seen = {}

    class Watch(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not seen:
                seen["once"] = {}
                seen["inner"] = run_validation(trainer)
                seen["outer"] = dict(trainer.callback_metrics)

    module = users.PlainClassifier()
    trainer_with(Watch()).validate(module, ragged(), verbose=False)
    expected = independently(module, ragged())
    assert seen["inner"] == pytest.approx(expected, rel=1e-5)
    assert {name: value.item() for name, value in seen["outer"].items()} == pytest.approx(expected, rel=1e-5)


def test_run_validation_validates_the_averaged_weights_where_the_run_does():
    ema = WeightAveraging(avg_fn=get_ema_avg_fn(0.5))

    class Watch(pl.Callback):
        pairs = ()

        def on_train_epoch_end(self, trainer, pl_module):
            before = {name: value.clone() for name, value in pl_module.state_dict().items()}
            own = {
                name: value.item()
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val")
            }
            self.pairs = (*self.pairs, (own, run_validation(trainer)))
            assert all(torch.equal(before[name], value) for name, value in pl_module.state_dict().items())

    watch = Watch()
    trainer_with(ema, watch).fit(users.PlainClassifier(), users.loader(), ragged())
    assert len(watch.pairs) == 2
    for own, found in watch.pairs:
        assert found == pytest.approx(own, rel=1e-6)


# --- sum_so_far, end_validation


@pytest.mark.parametrize("cls", [users.PlainClassifier, users.MetricObjects])
def test_what_is_summed_up_so_far_is_that_of_the_batches_so_far(cls):
    class Watch(pl.Callback):
        def __init__(self):
            self.found, self.samples = [], 0

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *indices):
            self.samples += len(batch[1])
            assert sum_so_far(trainer, "unknown", self.samples) is None
            self.found.append(sum_so_far(trainer, ACCURACY, self.samples))

    watch = Watch()
    once = Once(lambda trainer, module: (run_validation(trainer, watch), copy.deepcopy(module.net)))
    trainer_with(once).fit(cls(), users.loader(), ragged())
    logged, net = once.result
    x, y = users.images(20, seed=3).tensors
    with torch.no_grad():
        correct = (net.eval()(x).argmax(-1) == y).float()
    assert watch.found == [pytest.approx((correct[:n].sum().item(), n)) for n in (8, 16, 20)]
    assert logged[ACCURACY] == pytest.approx(correct.mean().item())


def test_a_validation_that_is_ended_is_that_of_the_batches_before_and_the_next_one_is_whole():
    class End(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *indices):
            if batch_idx == 1:
                end_validation()

    def both(trainer, pl_module):
        pl_module.net.blocks[0].eval()
        modes = [module.training for module in pl_module.modules()]
        ended, whole = run_validation(trainer, End()), run_validation(trainer)
        assert [module.training for module in pl_module.modules()] == modes
        return ended, whole, copy.deepcopy(pl_module)

    once = Once(both)
    workers = torch.utils.data.DataLoader(users.images(20, seed=3), 8, num_workers=1, persistent_workers=True)
    trainer_with(once).fit(users.PlainClassifier(), users.loader(), workers)
    ended, whole, module = once.result
    assert ended == pytest.approx(independently(module, list(ragged())[:2]), rel=1e-5)
    assert whole == pytest.approx(independently(module, ragged()), rel=1e-5)


class Spy(pl.Callback):
    """Notes every hook that Lightning calls."""

    def __init__(self):
        self.heard = []

    def __getattribute__(self, name):
        if name.startswith("on_validation"):
            object.__getattribute__(self, "heard").append(name)
        return super().__getattribute__(name)


class Noisy(users.MetricAttributes):
    """Draws random numbers in validation, logs in every hook, and freezes a part of itself."""

    def on_fit_start(self):
        self.net.blocks[0].eval()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        torch.rand(3)
        np.random.rand()  # noqa: NPY002
        random.random()
        super().validation_step(batch, batch_idx, dataloader_idx)

    def on_train_start(self):
        self.log("started", 1.0)


def state_of(trainer, module, memory):
    """What a user could look at."""
    loops = trainer.fit_loop
    return {
        "callback_metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "logged_metrics": {k: float(v) for k, v in trainer.logged_metrics.items()},
        "progress_bar_metrics": dict(trainer.progress_bar_metrics),
        "lines": list(memory.lines),
        "step": (trainer.global_step, trainer.current_epoch),
        "stage": (trainer.state.fn, trainer.state.stage, trainer.training, trainer.validating),
        "modes": [m.training for m in module.modules()],
        "loops": repr(loops.state_dict()),
        "validation": repr(loops.epoch_loop.val_loop.batch_progress),
        "callbacks": list(trainer.callbacks),
        "loggers": list(trainer.loggers),
        "grad": torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
    }


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"])
def test_run_validation_leaves_the_run_as_it_found_it(hook):
    spy = Spy()

    def around(trainer, pl_module):
        before, heard = state_of(trainer, pl_module, trainer.logger), len(spy.heard)
        run_validation(trainer)
        return before, state_of(trainer, pl_module, trainer.logger), len(spy.heard) - heard

    step = 6 if hook == "on_train_epoch_end" else 4
    once = Once(around, hook, step)
    trainer = trainer_with(once, spy, logger=Memory(), log_every_n_steps=1)
    trainer.fit(Noisy(), users.loader(), [ragged(), users.loader()])
    before, after, heard = once.result
    for name in before:
        assert after[name] == before[name], name
    assert heard == 0


@pytest.mark.parametrize("check", [1.0, 0.5])
def test_a_run_with_extra_validations_logs_saves_and_stops_as_the_run_without(tmp_path, check):
    class Often(pl.Callback):
        def extra(self, trainer, pl_module, *args):
            states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
            run_validation(trainer)
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            random.setstate(states[2])

        on_train_batch_start = on_train_batch_end = on_train_epoch_end = extra

    def run(folder, *callbacks):
        pl.seed_everything(0, verbose=False)
        memory, module = Memory(), users.ScheduledClassifier()
        best = ModelCheckpoint(
            folder, "{step}-{val_acc:.3f}", monitor=ACCURACY, mode="max", save_top_k=-1, save_last=True
        )
        stop = EarlyStopping(LOSS, min_delta=-1.0, patience=2, check_on_train_epoch_end=False)
        trainer = trainer_with(
            *callbacks, best, stop, logger=memory, log_every_n_steps=1, enable_checkpointing=True,
            max_epochs=3, val_check_interval=check,
        )  # fmt: skip
        trainer.fit(module, users.loader(shuffle=True), ragged())
        saved = torch.load(folder / "last.ckpt", weights_only=True)
        return memory.lines, sorted(p.name for p in folder.iterdir()), saved, stop.state_dict()

    plain, often = run(tmp_path / "plain"), run(tmp_path / "often", Often())
    assert often[0] == plain[0]
    assert often[1] == plain[1]
    assert often[3].keys() == plain[3].keys()
    assert float(often[3]["best_score"]) == float(plain[3]["best_score"])
    assert often[2].keys() == plain[2].keys()
    for name, value in plain[2]["state_dict"].items():
        assert torch.equal(often[2]["state_dict"][name], value), name
    assert repr(often[2]["loops"]) == repr(plain[2]["loops"])
    assert repr(often[2]["lr_schedulers"]) == repr(plain[2]["lr_schedulers"])


def test_an_error_in_the_users_validation_leaves_the_run_whole():
    class Fragile(users.PlainClassifier):
        breaks = False

        def validation_step(self, batch, batch_idx):
            if self.breaks:
                raise RuntimeError("boom")
            super().validation_step(batch, batch_idx)

    def around(trainer, pl_module):
        before = state_of(trainer, pl_module, trainer.logger)
        pl_module.breaks = True
        with pytest.raises(RuntimeError, match="boom"):
            run_validation(trainer)
        pl_module.breaks = False
        return before, state_of(trainer, pl_module, trainer.logger)

    once = Once(around, step=4)
    trainer = trainer_with(once, logger=Memory())
    trainer.fit(Fragile(), users.loader(), ragged())
    before, after = once.result
    for name in before:
        assert after[name] == before[name], name
    assert trainer.global_step == 6
