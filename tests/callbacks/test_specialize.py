"""A candidate's short fine-tuning against loops written by hand, and what it leaves alone."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import InstaTune, SupernetTraining, specialize
from pytorch_lightning.plugins import MixedPrecision
from torch.nn import functional as F

import lightning_nas as nas
from tests import user_modules as users
from tests.callbacks.test_module_is_whole import fingerprint
from tests.callbacks.test_supernet_training import (
    AT_ONCE,
    QUIET,
    assert_same,
    cross_entropy_of_soft_targets,
    fit,
    weights,
)

MIDDLE = {"depth": 2}


def trained(make=users.PlainClassifier, **settings):
    """A module after a short run with a family."""
    module, callback = make(), SupernetTraining(**AT_ONCE)
    fit(module, callback, max_epochs=1, **settings)
    return module, callback.supernet


def fresh(**settings):
    return pl.Trainer(**{**QUIET, **settings})


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("own_teacher", [False, True])
def test_a_specialised_network_is_that_of_the_loop_written_by_hand(accumulate, own_teacher):
    module, supernet = trained(lambda: users.PlainClassifier().double(), precision="64-true")
    architecture = supernet.space.architecture(MIDDLE)
    teacher = users.tiny_vit(seed=7).double() if own_teacher else None
    trainer = fresh(precision="64-true", accumulate_grad_batches=accumulate)
    small = specialize(
        nas.Candidate(architecture, {}), trainer, module, users.loader(), epochs=2, teacher=teacher,
        weight=0.25, temperature=2.0,
    )  # fmt: skip

    hand = users.PlainClassifier(supernet.extract(architecture))
    teacher = (teacher or supernet.extract(supernet.space.largest)).eval()
    optimizer = hand.configure_optimizers()
    for _ in range(2):
        batches = [(x.double(), y) for x, y in users.loader()]
        for start in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            for x, y in batches[start : start + accumulate]:
                student = hand.net(x)
                taught = 4 * cross_entropy_of_soft_targets(student / 2, teacher(x) / 2)
                ((0.25 * F.cross_entropy(student, y) + 0.75 * taught) / accumulate).backward()
            optimizer.step()
    assert len(small.blocks) == 2
    assert_same(weights(small), weights(hand.net), rtol=0, atol=1e-12)


def test_a_gradient_scaler_scales_the_teacher_too():
    module, supernet = trained()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    trainer = fresh(plugins=[plugin], gradient_clip_val=0.5)
    small = specialize(supernet.space.smallest, trainer, module, users.loader(), epochs=1)

    hand = users.PlainClassifier(supernet.extract(supernet.space.smallest))
    teacher, optimizer = supernet.extract(supernet.space.largest).eval(), hand.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in users.loader():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.half, cache_enabled=False):
            student = hand.net(x)
            loss = F.cross_entropy(student, y)
            with torch.no_grad():
                target = teacher(x)
        loss = 0.5 * loss + 0.5 * cross_entropy_of_soft_targets(student.float(), target.float())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    assert_same(weights(small), weights(hand.net), rtol=0, atol=1e-5)  # the sum of both is rounded to half


def test_features_are_taught_by_normalised_squared_distance():
    module, supernet = trained(lambda: users.NestedFeatures().double(), precision="64-true")
    head = copy.deepcopy(module.net.head)
    small = specialize(supernet.space.smallest, fresh(precision="64-true"), module, users.loader(), epochs=1)

    hand = users.NestedFeatures().double()
    hand.net.encoder.vit, hand.net.head = supernet.extract(supernet.space.smallest), head
    teacher, optimizer = supernet.extract(supernet.space.largest).eval(), hand.configure_optimizers()
    for x, y in users.loader():
        optimizer.zero_grad()
        features = hand.net.encoder.vit(x.double())
        student, target = (F.normalize(f, dim=-1) for f in (features, teacher(x.double()).detach()))
        taught = (student - target).square().sum(-1).mean()
        (0.5 * F.cross_entropy(hand.net.head(features), y) + 0.5 * taught).backward()
        optimizer.step()
    # normalised_mse computes in float32 whatever the input: rounding, not another formula
    assert_same(weights(small), weights(hand.net.encoder.vit), rtol=0, atol=2e-4)


class Augments(users.NestedFeatures):
    """Adds noise to its images, and has a head of its own with dropout before it."""

    def __init__(self):
        super().__init__()
        self.top, self.net.head = self.net.head, torch.nn.Identity()
        self.double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        x += torch.randn_like(x)  # in place
        self.log("noise", x.mean())
        return F.cross_entropy(self.top(F.dropout(self.net(x), 0.25, self.training)), y)


@pytest.mark.parametrize("named", [True, False])  # by the user, or by the callback that trained the family
def test_with_a_head_of_the_users_the_logits_of_his_whole_module_teach(named):
    module, callback = Augments(), SupernetTraining(head=None if named else "top", **AT_ONCE)
    fit(module, callback, max_epochs=1, precision="64-true")
    supernet, teacher = callback.supernet, copy.deepcopy(module).eval()
    pl.seed_everything(5, verbose=False)
    small = specialize(
        supernet.space.smallest, fresh(precision="64-true"), module, users.loader(), epochs=1,
        temperature=2.0, head="top" if named else None,
    )  # fmt: skip

    hand = copy.deepcopy(module)
    hand.net.encoder.vit = supernet.extract(supernet.space.smallest)
    optimizer = hand.configure_optimizers()
    pl.seed_everything(5, verbose=False)
    for x, y in [(x.double(), y) for x, y in users.loader()]:
        optimizer.zero_grad()
        noisy = x + torch.randn_like(x)
        with torch.no_grad():
            target = teacher.top(teacher.net(noisy))
        logits = hand.top(F.dropout(hand.net(noisy), 0.25))
        taught = 4 * cross_entropy_of_soft_targets(logits / 2, target / 2)
        (0.5 * F.cross_entropy(logits, y) + 0.5 * taught).backward()
        optimizer.step()
    assert_same(weights(small), weights(hand.net.encoder.vit), rtol=0, atol=1e-12)


def test_with_labels_alone_it_is_the_plain_fit_of_the_extracted_network_bit_for_bit():
    module, supernet = trained(users.ScheduledClassifier)  # with dropout and drop-path
    plain = users.ScheduledClassifier(supernet.extract(supernet.space.smallest))
    pl.seed_everything(3, verbose=False)
    fit(plain, data=users.loader(shuffle=True), max_epochs=2)
    after = torch.rand(3)
    pl.seed_everything(3, verbose=False)
    small = specialize(
        supernet.space.smallest, fresh(), module, users.loader(shuffle=True), epochs=2, weight=1.0
    )
    assert torch.equal(torch.rand(3), after)
    assert_same(weights(small), weights(plain.net), rtol=0, atol=0)


def test_the_teacher_sees_no_dropout_and_moves_no_random_number():
    module, supernet = trained(users.ScheduledClassifier)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(torch.get_rng_state())

    for weight in (0.5, 1.0):
        torch.manual_seed(0)
        specialize(
            supernet.space.smallest,
            fresh(callbacks=[Watch()]),
            module,
            users.loader(),
            epochs=1,
            weight=weight,
        )
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))


def test_the_users_module_its_network_and_the_supernet_stay_as_they_are():
    module, supernet = trained(users.MetricAttributes)
    before, values, last_trainer = fingerprint(module), weights(module), module.trainer
    teacher = users.tiny_vit(seed=7)
    kept = weights(teacher), teacher.training, [p.requires_grad for p in teacher.parameters()]
    small = specialize(supernet.space.smallest, fresh(), module, users.loader(), epochs=1, teacher=teacher)
    assert fingerprint(module) == before
    assert_same(weights(module), values, rtol=0, atol=0)
    assert module.trainer is last_trainer
    assert supernet.active == supernet.space.largest
    assert_same(weights(teacher), kept[0], rtol=0, atol=0)
    assert (teacher.training, [p.requires_grad for p in teacher.parameters()]) == kept[1:]
    assert fingerprint(small) == fingerprint(supernet.extract(supernet.space.smallest))
    assert small.training


def test_after_a_crash_the_users_module_is_whole_and_it_can_be_tried_again():
    module, supernet = trained()

    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("boom")

    before, values = fingerprint(module), weights(module)
    with pytest.raises(RuntimeError, match="boom"):
        specialize(supernet.space.smallest, fresh(callbacks=[Crash()]), module, users.loader(), epochs=1)
    assert fingerprint(module) == before
    assert_same(weights(module), values, rtol=0, atol=0)
    again, once = (
        specialize(supernet.space.smallest, fresh(), module, users.loader(), epochs=1) for _ in range(2)
    )
    assert_same(weights(again), weights(once), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("epochs", "settings", "batches"),
    [
        (0.5, {}, [6]),
        (1, {}, [12]),
        (1.5, {}, [9, 9]),
        (0.5, {"limit_train_batches": 0.5}, [3]),
        (0.5, {"limit_train_batches": 5}, [2]),
        (2, {"max_epochs": 7}, [12, 12]),
        (2, {"fast_dev_run": True}, [1]),
    ],
)
def test_epochs_are_equal_shares_of_whole_passes(epochs, settings, batches):
    module, supernet = trained()
    seen, planned = {}, []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            planned.append(trainer.estimated_stepping_batches)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen[trainer.current_epoch] = seen.get(trainer.current_epoch, 0) + 1

    data = users.loader(users.images(24), batch_size=2)
    specialize(supernet.space.smallest, fresh(callbacks=[Watch()], **settings), module, data, epochs=epochs)
    assert list(seen.values()) == batches
    assert planned == [sum(batches)]  # what schedulers are made from


def test_candidates_of_instatune_are_specialised_with_a_datamodule():
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return users.loader()

        def val_dataloader(self):
            return users.loader()

    module, instatune = users.PlainClassifier(), InstaTune(budget=3, **AT_ONCE)
    pl.Trainer(callbacks=[instatune], max_epochs=1, **QUIET).fit(module, datamodule=Data())
    trainer = fresh()
    small = specialize(instatune.result.front[0], trainer, module, Data(), epochs=1)
    assert "val_acc" in trainer.callback_metrics
    changed = weights(instatune.extract(instatune.result.front[0]))
    assert any(not torch.equal(value, changed[name]) for name, value in weights(small).items())


class HoldsTheHead(users.PlainClassifier):
    """Calls the network in two pieces, and keeps one of them by a name of its own."""

    def __init__(self):
        super().__init__()
        self.head = self.net.head

    def training_step(self, batch, batch_idx):
        x, y = batch
        net_output = self.net(x)
        return F.cross_entropy(net_output, y) + self.head.weight.square().sum()


def test_what_the_module_holds_of_the_network_by_itself_becomes_that_of_the_small_one():
    module, supernet = trained(HoldsTheHead)
    seen = []

    class Watch(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            seen.append(pl_module.head is pl_module.net.head)

    specialize(supernet.space.smallest, fresh(callbacks=[Watch()]), module, users.loader(), epochs=1)
    assert seen == [True]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["network", "module"])
def test_a_compiled_network_or_module_is_specialised_too(compiled):
    if compiled == "network":
        net = torch.compile(users.tiny_vit(), backend="eager")
        module, supernet = trained(lambda: users.PlainClassifier(net))
    else:
        module, callback = users.PlainClassifier(), SupernetTraining(**AT_ONCE)
        fit(torch.compile(module, backend="eager"), callback, max_epochs=1)
        supernet = callback.supernet
    values = weights(module)
    small = specialize(supernet.space.smallest, fresh(), module, users.loader(), epochs=1)
    assert_same(weights(module), values, rtol=0, atol=0)
    plain = users.PlainClassifier(supernet.extract(supernet.space.largest))
    expected = specialize(
        supernet.space.smallest, fresh(), plain, users.loader(), epochs=1, supernet=nas.Supernet(plain.net)
    )
    assert_same(weights(small), weights(expected), rtol=0, atol=1e-6)


def test_a_module_that_makes_its_network_anew_is_told_how_not_to():
    class InSetup(users.PlainClassifier):
        def setup(self, stage):
            if stage == "fit":
                self.net = users.tiny_vit()

    module, supernet = trained(InSetup)
    with pytest.raises(nas.NASError, match="InSetup made its network anew.*'if self.network is None"):
        specialize(supernet.space.smallest, fresh(), module, users.loader())


def test_a_network_made_in_configure_model_is_specialised():
    module, supernet = trained(users.ConfiguredLate)
    small = specialize(supernet.space.smallest, fresh(), module, users.loader(), epochs=1)
    assert len(small.blocks) == 2


class IgnoresItsNetwork(users.PlainClassifier):
    def __init__(self):
        super().__init__()
        self.own = torch.nn.Linear(64, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.own(batch[0].flatten(1)), batch[1])


def test_what_cannot_work_is_refused_with_the_remedy():
    module, supernet = trained()
    smallest, other = supernet.space.smallest, nas.SearchSpace([nas.Choice("depth", (1,))]).largest
    released = nas.Supernet(users.tiny_vit())
    released.release()
    ignoring = IgnoresItsNetwork()
    in_ignoring = nas.Supernet(ignoring.net)

    class Manual(users.PlainClassifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    five_classes = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    manual = Manual()
    in_manual = nas.Supernet(manual.net)
    done = fresh(max_epochs=1)
    done.fit(users.PlainClassifier(), users.loader())
    for arguments, settings, error, message in [
        ((smallest, fresh(), module), {"epochs": 0}, ValueError, "epochs must be above 0 and finite, got 0"),
        ((smallest, fresh(), module), {"weight": 2}, ValueError, r"weight must be in \[0, 1\], got 2"),
        ((smallest, fresh(), module), {"temperature": 0}, ValueError, "temperature must be above 0, got 0"),
        ((smallest, fresh(), module), {"epochs": 0.1}, ValueError, "epochs=0.1 is less than one batch"),
        (
            (smallest, fresh(), module), {"head": "net.head", "teacher": users.tiny_vit()},
            nas.UnsupportedError, "with head='net.head' the teacher is your module.*leave teacher out",
        ),
        ((smallest, fresh(), module), {"head": "tip"}, nas.NoMatchError, "specialize: no sub-module 'tip'"),
        ((other, fresh(), module), {}, ValueError, "is not in the space of this supernet.*own search"),
        ((smallest, done, module), {}, nas.UnsupportedError, r"already trained \(3 steps\).*fresh one"),
        ((smallest, fresh(callbacks=[InstaTune()]), module), {}, nas.UnsupportedError, "leave it out"),
        ((smallest, fresh(), users.PlainClassifier()), {}, nas.NASError, "had 0 callbacks.*supernet="),
        ((smallest, fresh(), module), {"supernet": released}, nas.NASError, "was released"),
        (
            (smallest, fresh(), users.PlainClassifier()), {"supernet": supernet},
            nas.NASError, "network of the supernet .* is not in this PlainClassifier",
        ),
        (
            (smallest, fresh(), module), {"teacher": users.tiny_vit(num_classes=5)},
            nas.UnsupportedError, r"the teacher \(VisionTransformer\) has 5 classes and the network has 3",
        ),
        (
            (smallest, fresh(), module), {"teacher": five_classes, "epochs": 1},
            nas.UnsupportedError, r"shape \(8, 5\) where the network's has \(8, 3\)",
        ),
        (
            (smallest, fresh(), ignoring), {"supernet": in_ignoring, "epochs": 1},
            nas.UnsupportedError, "the loss of training_step does not depend on",
        ),
        (
            (smallest, fresh(), manual), {"supernet": in_manual, "epochs": 1},
            nas.UnsupportedError, "manual optimization is not supported",
        ),
    ]:  # fmt: skip
        values = weights(arguments[2])
        with pytest.raises(error, match=message):
            specialize(*arguments, users.loader(), **settings)
        assert_same(weights(arguments[2]), values, rtol=0, atol=0)
