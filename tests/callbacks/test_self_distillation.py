"""Teaching by earlier versions against loops written by hand, and what it owes the user's module."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SelfDistillation, SupernetTraining
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F

import lightning_nas as nas
from tests import user_modules as users
from tests.callbacks import test_resume as resume
from tests.callbacks.test_module_is_whole import Crashes, fingerprint
from tests.callbacks.test_supernet_training import AT_ONCE, QUIET, assert_same, fit, weights


def kl(student, target, temperature):
    """Of the teachers' probabilities and the student's, times the squared temperature."""
    q = (student / temperature).softmax(-1)
    return temperature**2 * (target * (target / q).log()).sum(-1).mean()


def by_hand(module, *, epochs, accumulate=1, snapshots=0, unit="epoch", ema=None, weight=(1.0, 1.0), tau=1.0,
            warmup=0):  # fmt: skip
    """Training with earlier versions as teachers, written out."""
    module.train()
    optimizer, kept, average, step = module.configure_optimizers(), [], None, 0
    total = epochs * -(-3 // accumulate)
    for epoch in range(epochs):
        batches = [(x.double(), y) for x, y in users.loader()]
        for start in range(0, 3, accumulate):
            optimizer.zero_grad()
            for x, y in batches[start : start + accumulate]:
                logits = module.net(x)
                loss = F.cross_entropy(logits, y)
                teachers = [*kept, *([average] if average else [])]
                if teachers and step >= warmup:
                    share = weight[0] + (weight[1] - weight[0]) * (step - warmup) / (total - warmup)
                    with torch.no_grad():
                        p = sum((t(x) / tau).softmax(-1) for t in teachers) / len(teachers)
                    loss = loss + share * kl(logits, p, tau)
                (loss / accumulate).backward()
            optimizer.step()
            step += 1
            if ema and average is None:
                average = copy.deepcopy(module.net).eval()
            elif ema:
                with torch.no_grad():
                    for slow, fast in zip(average.parameters(), module.net.parameters(), strict=True):
                        slow.copy_(ema * slow + (1 - ema) * fast)
            if unit == "step":
                kept = [*kept, copy.deepcopy(module.net).eval()][-snapshots:]
        if unit == "epoch" and snapshots and epoch < epochs - 1:  # none learns from the last
            kept = [*kept, copy.deepcopy(module.net).eval()][-snapshots:]
    return kept, average


SETTINGS = {
    "snapshots of epochs": ({"snapshots": 2}, {"snapshots": 2}),
    "snapshots of steps": ({"snapshots": 3, "unit": "step"}, {"snapshots": 3, "unit": "step"}),
    "a moving average": ({"snapshots": 0, "ema": 0.7}, {"ema": 0.7}),
    "both, ramped and softened": (
        {"ema": 0.7, "snapshots": 1, "weight": (0.0, 2.0), "temperature": 3.0, "warmup": 2},
        {"ema": 0.7, "snapshots": 1, "weight": (0.0, 2.0), "tau": 3.0, "warmup": 2},
    ),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_equals_the_loop_written_by_hand(name, accumulate):
    ours, hand = (users.PlainClassifier(users.tiny_vit(proj_drop_rate=0.0)).double() for _ in range(2))
    settings, hand_settings = SETTINGS[name]
    callback = SelfDistillation(**settings)
    fit(ours, callback, max_epochs=4, precision="64-true", accumulate_grad_batches=accumulate)
    kept, average = by_hand(hand, epochs=4, accumulate=accumulate, **hand_settings)
    # The bias of keys has no gradient but rounding, about 1e-17, which Adam divides by its own size or 1e-8.
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-9)
    for teacher, expected in zip(callback.teachers, [*kept, *([average] if average else [])], strict=True):
        assert_same(weights(teacher), weights(expected), rtol=0, atol=1e-9)


def test_a_majority_teaches_its_class_alone():
    ours, hand = users.PlainClassifier().double(), users.PlainClassifier().double()
    fit(ours, SelfDistillation(snapshots=3, unit="step", vote="majority"), max_epochs=2, precision="64-true")
    hand.train()
    optimizer, kept = hand.configure_optimizers(), []
    for _ in range(2):
        for x, y in users.loader():
            optimizer.zero_grad()
            logits = hand.net(x.double())
            loss = F.cross_entropy(logits, y)
            if kept:
                with torch.no_grad():
                    said = torch.stack([teacher(x.double()).softmax(-1) for teacher in kept])
                target = said.mean(0)
                for i, votes in enumerate(said.argmax(-1).T.tolist()):
                    counts = [votes.count(c) for c in range(3)]
                    if counts.count(max(counts)) == 1:
                        target[i] = F.one_hot(torch.tensor(counts.index(max(counts))), 3)
                loss = loss - (target * logits.log_softmax(-1)).sum(-1).mean()  # the gradient of the KL
            loss.backward()
            optimizer.step()
            kept = [*kept, copy.deepcopy(hand.net).eval()][-3:]
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-12)


def test_a_gradient_scaler_scales_the_teachers_too():
    ours, hand = users.PlainClassifier(), users.PlainClassifier()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    callback = SelfDistillation(snapshots=1, unit="step", weight=2.0)
    fit(ours, callback, max_epochs=1, plugins=[plugin], gradient_clip_val=0.5)

    optimizer, teacher = hand.configure_optimizers(), None
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in users.loader():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.half, cache_enabled=False):
            logits = hand.net(x)
            loss = F.cross_entropy(logits, y)
            if teacher:
                with torch.no_grad():
                    p = teacher(x).float().softmax(-1)
                loss = loss + 2 * kl(logits.float(), p, 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        teacher = copy.deepcopy(hand.net).eval()
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-5)  # the sum of both is rounded to half


@pytest.mark.parametrize(
    "settings", [{"weight": 0.0, "ema": 0.9, "unit": "step"}, {"every": 9}, {"warmup": 6}]
)
def test_before_there_is_a_weight_or_a_teacher_no_bit_of_training_changes(settings):
    def run(callbacks):
        pl.seed_everything(3, verbose=False)
        module = users.ScheduledClassifier()  # with dropout and drop-path
        trainer = pl.Trainer(callbacks=callbacks, max_epochs=2, **QUIET)
        trainer.fit(module, users.loader(shuffle=True), users.loader())
        return weights(module), {k: v.item() for k, v in trainer.callback_metrics.items()}, torch.rand(3)

    plain, ours = run([]), run([SelfDistillation(**settings)])
    assert_same(plain[0], ours[0], rtol=0, atol=0)
    assert plain[1] == ours[1]
    assert torch.equal(plain[2], ours[2])


def test_teachers_leave_the_random_state_of_the_run_alone_and_have_no_dropout():
    def states(weight):
        seen = []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                seen.append(torch.get_rng_state())

        pl.seed_everything(0, verbose=False)
        callback = SelfDistillation(unit="step", weight=weight)
        fit(users.AugmentingClassifier(), callback, callbacks=[Watch()], max_epochs=2)
        assert not any(child.training for teacher in callback.teachers for child in teacher.modules())
        return seen

    assert all(torch.equal(a, b) for a, b in zip(states(0.0), states(1.0), strict=True))


# --- resume, second fits, exceptions


@pytest.mark.parametrize("step", [2, 5, 7, 10, 13])
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_resumed_run_ends_with_the_weights_and_teachers_of_the_uninterrupted_one(step, unit):
    def make():
        return SelfDistillation(snapshots=2, unit=unit, ema=0.8, weight=(0.5, 1.0), warmup=2)

    whole, whole_callback = resume.run(make)
    resumed, callback = resume.run(make, ckpt_path=f"kept/step={step}.ckpt")
    assert_same(weights(whole), weights(resumed), rtol=0, atol=0)
    assert len(callback.teachers) == 3
    for teacher, expected in zip(callback.teachers, whole_callback.teachers, strict=True):
        assert_same(weights(teacher), weights(expected), rtol=0, atol=0)


def test_a_resume_from_the_end_of_an_epoch_takes_its_snapshot_once():
    def run(ckpt_path=None):
        torch.manual_seed(0)
        module, callback = users.PlainClassifier(), SelfDistillation(snapshots=3)
        keep = ModelCheckpoint(
            dirpath="kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        trainer = pl.Trainer(
            callbacks=[keep, callback], max_epochs=4, **{**QUIET, "enable_checkpointing": True}
        )
        trainer.fit(module, users.loader(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module, callback

    whole, whole_callback = run()
    resumed, callback = run("kept/epoch=1.ckpt")
    assert_same(weights(whole), weights(resumed), rtol=0, atol=0)
    for teacher, expected in zip(callback.teachers, whole_callback.teachers, strict=True):
        assert_same(weights(teacher), weights(expected), rtol=0, atol=0)


def test_a_second_fit_starts_without_teachers_and_a_longer_one_keeps_them():
    module, callback = users.PlainClassifier(), SelfDistillation(snapshots=5)
    trainer = fit(module, callback, max_epochs=3)
    assert len(callback.teachers) == 2
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, users.loader())
    assert len(callback.teachers) == 3
    fit(module, callback, max_epochs=2)
    assert len(callback.teachers) == 1
    assert not module.net._forward_hooks


@pytest.mark.parametrize("call", [1, 5])
def test_after_a_crash_the_module_is_whole_and_fits_again(call):
    module, callback = Crashes(call), SelfDistillation(ema=0.5)
    before = fingerprint(module)
    with pytest.raises(RuntimeError, match="boom"):
        fit(module, callback, max_epochs=2)
    assert fingerprint(module) == before
    fit(module, callback, max_epochs=2)
    assert len(callback.teachers) == 2


# --- which network


class BackboneAndHead(pl.LightningModule):
    """Two parts that only ``forward`` puts together, batch norm, and a second output in training_step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return {"loss": F.cross_entropy(logits, y), "logits": logits}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_of_several_parts_teaches_itself_as_a_whole_with_its_own_statistics():
    ours, hand = BackboneAndHead().double(), BackboneAndHead().double()
    fit(ours, SelfDistillation(snapshots=1), max_epochs=3, precision="64-true")

    optimizer, teacher = hand.configure_optimizers(), None
    for _ in range(3):
        for x, y in users.loader():
            optimizer.zero_grad()
            logits = hand(x.double())
            loss = F.cross_entropy(logits, y)
            if teacher:
                loss = loss + kl(logits, teacher(x.double()).softmax(-1).detach(), 1.0)
            loss.backward()
            optimizer.step()
        teacher = copy.deepcopy(hand).eval()
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-12)


def test_features_are_taught_by_normalised_squared_distance():
    ours, hand = users.NestedFeatures().double(), users.NestedFeatures().double()
    callback = SelfDistillation("net.encoder.vit", snapshots=2, unit="step")
    fit(ours, callback, max_epochs=2, precision="64-true")

    vit, kept = hand.net.encoder.vit, []
    optimizer = hand.configure_optimizers()
    for x, y in [*users.loader(), *users.loader()]:
        optimizer.zero_grad()
        features = vit(x.double())
        loss = F.cross_entropy(hand.net.head(features), y)
        if kept:
            target = F.normalize(sum(teacher(x.double()) for teacher in kept).detach(), dim=-1)
            loss = loss + (F.normalize(features, dim=-1) - target).square().sum(-1).mean()
        loss.backward()
        optimizer.step()
        kept = [*kept, copy.deepcopy(vit).eval()][-2:]
    # normalised_mse computes in float32 whatever the input: rounding, not another formula
    assert_same(weights(ours), weights(hand), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("make", "network"),
    [
        (users.DictBatches, None),
        (users.DataclassOutput, None),
        (users.TupleOutputs, None),
        (users.CalledTwice, None),
        (users.MetricAttributes, None),
        (users.ConfiguredLate, None),
        (users.SkipsBatches, None),
        (users.TwoNetworks, "student"),
        (lambda: users.PlainClassifier(torch.compile(users.tiny_vit(), backend="eager")), None),
    ],
)
def test_modules_of_all_habits_learn_from_themselves(make, network):
    logged = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.append(trainer.callback_metrics.get("self_distillation_loss"))

    data = {users.DictBatches: users.DictImages()}.get(make)
    data = users.DictImages(names=("pixel_values", "labels")) if make is users.DataclassOutput else data
    callback = SelfDistillation(network, snapshots=2, unit="step")
    fit(make(), callback, users.loader(data), callbacks=[Watch()], max_epochs=2, limit_val_batches=0)
    assert len(callback.teachers) == 2
    assert logged[0] is None
    assert max(loss for loss in logged if loss is not None) > 0


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_a_supernet_the_teachers_follow_the_order_of_its_units(ours_first):
    """What the largest network and its teachers say is the same before and after the reordering."""
    module, own = users.PlainClassifier().double(), SelfDistillation(snapshots=2, unit="step", ema=0.5)
    family = SupernetTraining(warmup=3, students_learn_from="teacher", validate=())
    said = {}

    class Watch(pl.Callback):
        def __init__(self, moment):
            self.moment = moment

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                x = users.images().tensors[0].double()
                said[self.moment] = [teacher(x) for teacher in own.teachers], weights(own.teachers[0])

    pair = [own, family] if ours_first else [family, own]
    fit(module, None, callbacks=[Watch("before"), *pair, Watch("after")], max_epochs=2, precision="64-true")
    assert any((a != said["after"][1][n]).any() for n, a in said["before"][1].items())
    for before, after in zip(said["before"][0], said["after"][0], strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-12)
    assert family.sandwich_steps == 3


def test_a_step_with_students_adds_the_teachers_once():
    ours, hand = users.PlainClassifier().double(), users.PlainClassifier().double()
    family = SupernetTraining(sampler=nas.Sandwich(1), students_learn_from="both", **AT_ONCE)
    callbacks = [SelfDistillation(snapshots=1, unit="step")]
    fit(ours, family, callbacks=callbacks, max_epochs=1, precision="64-true")

    supernet, optimizer, teacher = nas.Supernet(hand.net), hand.configure_optimizers(), None
    for step, (x, y) in enumerate(users.loader()):
        x = x.double()
        optimizer.zero_grad()
        largest = hand.net(x)
        loss = F.cross_entropy(largest, y)
        if teacher:
            loss = loss + kl(largest, teacher(x).softmax(-1).detach(), 1.0)
        loss.backward()
        for member in nas.Sandwich(1).students(supernet.space, 0, step, 0.0):
            with supernet.using(member):
                student = hand.net(x)
                soft = -(largest.detach().softmax(-1) * student.log_softmax(-1)).sum(-1).mean()
                (0.5 * F.cross_entropy(student, y) + 0.5 * soft).backward()
        optimizer.step()
        teacher = copy.deepcopy(hand.net).eval()
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-12)


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snapshots": 0}, "at least one teacher is needed, got snapshots=0 and ema=None"),
        ({"snapshots": -1, "ema": 0.9}, "at least one teacher is needed, got snapshots=-1"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"unit": "batch"}, "unit must be 'epoch' or 'step', got 'batch'"),
        ({"ema": 1.0}, r"ema must be in \(0, 1\), got 1.0"),
        ({"weight": (0.5, -1)}, r"weight must be at least 0, got \(0.5, -1\)"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"vote": "loss"}, "vote must be 'mean' or 'majority', got 'loss'"),
        ({"every": 0, "vote": "loss"}, "every must.*and vote must"),
        ({"warmup": 1.5}, "warmup must be a fraction of the run"),
    ],
)
def test_arguments_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfDistillation(**settings)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from users.images()


def test_what_cannot_work_is_refused_with_the_remedy_and_changes_nothing():
    class Manual(users.PlainClassifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    class Lbfgs(users.PlainClassifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    class Detached(users.PlainClassifier):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).detach().mean() + self.net.head.weight.sum()

    class CallsForward(BackboneAndHead):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.forward(batch[0]), batch[1])

    unsupported, endless = nas.UnsupportedError, torch.utils.data.DataLoader(Endless(), 8)
    for module, settings, data, error, message in [
        (Manual(), {}, None, unsupported, "manual optimization is not supported"),
        (Lbfgs(), {}, None, unsupported, "LBFGS runs training_step several times a step"),
        (Detached(), {}, None, unsupported, "does not depend on what was read.*output="),
        (CallsForward(), {}, None, unsupported, "does not depend on what was read.*network="),
        (users.PlainClassifier(), {"network": "nett"}, None, nas.NoMatchError, "Nearest names: net"),
        (users.PlainClassifier(), {"weight": (0, 1)}, endless, ValueError, "its length is unknown.*single"),
        (users.PlainClassifier(), {"warmup": 0.5}, endless, ValueError, "its length is unknown"),
    ]:
        before, values = fingerprint(module), [p.detach().clone() for p in module.parameters()]
        with pytest.raises(error, match=message):
            fit(module, SelfDistillation(**settings), data, max_epochs=1 if data is None else -1)
        assert fingerprint(module) == before
        assert all(map(torch.equal, module.parameters(), values))
