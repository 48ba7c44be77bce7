"""The sandwich step against loops written by hand, and what it owes the user's module."""

import copy
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SupernetTraining
from pytorch_lightning.plugins import MixedPrecision
from torch.nn import functional as F

import lightning_nas as nas
from tests import user_modules as users

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}
AT_ONCE = {"warmup": 0, "order": None, "validate": ()}


def fit(module, callback=None, data=None, callbacks=(), **settings):
    trainer = pl.Trainer(callbacks=[*([callback] if callback else []), *callbacks], **QUIET, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
        trainer.fit(module, users.loader() if data is None else data)
    return trainer


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def cross_entropy_of_soft_targets(student, teacher):
    return -(teacher.detach().softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


def by_hand(
    module,
    optimizer,
    members,
    *,
    task_share,
    accumulate=1,
    clip=None,
    per_step=None,
    per_epoch=None,
    epochs=1,
):
    """The sandwich step, written out."""
    supernet = nas.Supernet(module.net)
    module.train()
    step = 0
    for _ in range(epochs):
        batches = [(x.to(torch.float64), y) for x, y in users.loader()]
        for start in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            for x, y in batches[start : start + accumulate]:
                largest = module.net(x)
                (F.cross_entropy(largest, y) / accumulate).backward()
                for member in members(supernet.space, step):
                    with supernet.using(member):
                        student = module.net(x)
                        loss = (1 - task_share) * cross_entropy_of_soft_targets(student, largest)
                        loss = loss + task_share * F.cross_entropy(student, y)
                        (loss / accumulate).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            step += 1
            if per_step:
                per_step.step()
        if per_epoch:
            per_epoch.step()
    supernet.release()


SANDWICH = nas.Sandwich(random=2)


def sandwich(space, step):
    return SANDWICH.students(space, 0, step, 0.0)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(("learn", "task_share"), [("teacher", 0.0), ("both", 0.5), ("task", 1.0)])
def test_a_run_equals_the_loop_written_by_hand(accumulate, clip, learn, task_share):
    ours, hand = (users.PlainClassifier().double() for _ in range(2))
    fit(
        ours,
        SupernetTraining(sampler=SANDWICH, students_learn_from=learn, **AT_ONCE),
        max_epochs=2,
        precision="64-true",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    optimizer = hand.configure_optimizers()
    by_hand(hand, optimizer, sandwich, task_share=task_share, accumulate=accumulate, clip=clip, epochs=2)
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-12)


def test_two_schedulers_see_the_users_rate_and_the_factor_multiplies_the_step_only():
    ours, hand = (users.ScheduledClassifier(users.tiny_vit()).double() for _ in range(2))
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    callback = SupernetTraining(sampler=SANDWICH, students_learn_from="teacher", lr_factor=3.0, **AT_ONCE)
    fit(ours, callback, max_epochs=2, precision="64-true", callbacks=[Watch()])
    # SGD with momentum is linear in the rate of each step: three times the rate by hand.
    [optimizer], [per_step, per_epoch] = hand.configure_optimizers()

    class Tripled:
        zero_grad = optimizer.zero_grad

        @staticmethod
        def step():
            for group in optimizer.param_groups:
                group["lr"] *= 3
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] /= 3

    by_hand(
        hand, Tripled, sandwich, task_share=0.0, epochs=2,
        per_step=per_step["scheduler"], per_epoch=per_epoch["scheduler"],
    )  # fmt: skip
    assert_same(weights(ours), weights(hand), rtol=1e-12, atol=1e-12)
    assert rates == pytest.approx([1e-2 * 0.9**k * 0.5 ** (k // 3) for k in range(6)])


def test_an_explicit_gradient_scaler_scales_the_students_too():
    ours, hand = users.PlainClassifier(), users.PlainClassifier()
    plugin = MixedPrecision(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    )
    callback = SupernetTraining(sampler=SANDWICH, students_learn_from="teacher", **AT_ONCE)
    fit(ours, callback, max_epochs=1, plugins=[plugin], gradient_clip_val=0.5)

    supernet, optimizer = nas.Supernet(hand.net), hand.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step, (x, y) in enumerate(users.loader()):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.half, cache_enabled=False):
            largest = hand.net(x)
            loss = F.cross_entropy(largest, y)
        scaler.scale(loss).backward()
        for member in sandwich(supernet.space, step):
            with supernet.using(member):
                with torch.autocast("cpu", torch.half, cache_enabled=False):
                    student = hand.net(x)
                    loss = cross_entropy_of_soft_targets(student.float(), largest.float())
                scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-6)


def test_a_network_called_twice_teaches_by_the_mean_of_both_calls():
    ours, hand = users.CalledTwice().double(), users.CalledTwice().double()
    fit(
        ours,
        SupernetTraining(sampler=SANDWICH, students_learn_from="teacher", **AT_ONCE),
        precision="64-true",
        max_epochs=1,
    )

    supernet, optimizer = nas.Supernet(hand.net), hand.configure_optimizers()
    for step, (x, y) in enumerate(users.loader()):
        x = x.double()
        optimizer.zero_grad()
        first, second = hand.net(x), hand.net(x.flip(-1))
        (F.cross_entropy(first, y) + (first - second).square().mean()).backward()
        for member in sandwich(supernet.space, step):
            with supernet.using(member):
                losses = [
                    cross_entropy_of_soft_targets(hand.net(view), teacher)
                    for view, teacher in ((x, first), (x.flip(-1), second))
                ]
                (sum(losses) / 2).backward()
        optimizer.step()
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-12)


class Seeded(pl.Callback):
    """Makes the random state of each batch known to the test."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(batch_idx)
        np.random.seed(batch_idx)  # noqa: NPY002


@pytest.mark.parametrize("regularize", ["largest", "all"])
def test_task_students_see_the_same_augmentation_and_their_own_or_no_dropout(regularize):
    ours, hand = users.AugmentingClassifier().double(), users.AugmentingClassifier().double()
    callback = SupernetTraining(
        sampler=SANDWICH, students_learn_from="task", regularize=regularize, **AT_ONCE
    )
    trainer = pl.Trainer(callbacks=[Seeded(), callback], precision="64-true", max_epochs=1, **QUIET)
    trainer.fit(ours, users.loader())

    hand.log = lambda *args, **kwargs: None
    hand.train()
    supernet, optimizer = nas.Supernet(hand.net), hand.configure_optimizers()
    dropouts = [module for module in hand.modules() if isinstance(module, torch.nn.Dropout)]
    rates = [dropout.p for dropout in dropouts]
    assert any(rates)
    for step, (x, y) in enumerate(users.loader()):
        optimizer.zero_grad()
        Seeded().on_train_batch_start(None, None, None, step)
        hand.training_step((x.double(), y), step).backward()
        for member in sandwich(supernet.space, step):
            Seeded().on_train_batch_start(None, None, None, step)
            for dropout, rate in zip(dropouts, rates, strict=True):
                dropout.p = rate if regularize == "all" else 0.0
            with supernet.using(member):
                hand.training_step((x.double(), y), step).backward()
        for dropout, rate in zip(dropouts, rates, strict=True):
            dropout.p = rate
        optimizer.step()
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-12)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_instatunes_loss_equals_equation_1_written_by_hand(members, strong, accumulate):
    ours, hand = users.PlainClassifier().double(), users.PlainClassifier().double()
    teacher = users.tiny_vit(seed=5).double().eval() if strong else None
    rule = nas.InstaTuneLoss(alpha=0.3, temperature=2.0, strong_teacher=copy.deepcopy(teacher))
    sampler = nas.Random(random=members)
    callback = SupernetTraining(sampler=sampler, students_learn_from=rule, **AT_ONCE)
    fit(ours, callback, precision="64-true", max_epochs=1, accumulate_grad_batches=accumulate)

    def kl(student, target, rho=2.0):
        p, q = (target.detach() / rho).softmax(-1), (student / rho).softmax(-1)
        return rho**2 * (p * (p / q).log()).sum(-1).mean()

    supernet, optimizer, alpha = nas.Supernet(hand.net), hand.configure_optimizers(), 0.3
    batches = [(x.double(), y) for x, y in users.loader()]
    for start in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        for x, y in batches[start : start + accumulate]:
            largest = hand.net(x)
            loss = alpha * F.cross_entropy(largest, y)
            target = teacher(x).detach() if strong else largest.detach()
            if strong:
                loss = loss + (1 - alpha) * kl(largest, target)
            (loss / accumulate).backward()
            for member in sampler.students(supernet.space, 0, start // accumulate, 0.0):
                with supernet.using(member):
                    student = hand.net(x)
                    loss = alpha * F.cross_entropy(student, y) + (1 - alpha) * kl(student, target)
                    (loss / accumulate).backward()
        optimizer.step()
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-12)


def test_features_are_taught_by_normalised_squared_distance():
    ours, hand = users.NestedFeatures().double(), users.NestedFeatures().double()
    fit(
        ours,
        SupernetTraining(sampler=SANDWICH, students_learn_from="teacher", **AT_ONCE),
        precision="64-true",
        max_epochs=1,
    )

    vit = hand.net.encoder.vit
    supernet, optimizer = nas.Supernet(vit), hand.configure_optimizers()
    for step, (x, y) in enumerate(users.loader()):
        optimizer.zero_grad()
        features = vit(x.double())
        F.cross_entropy(hand.net.head(features), y).backward()
        for member in sandwich(supernet.space, step):
            with supernet.using(member):
                student = F.normalize(vit(x.double()), dim=-1)
                (student - F.normalize(features.detach(), dim=-1)).square().sum(-1).mean().backward()
        optimizer.step()
    # normalised_mse computes in float32 whatever the input: rounding, not another formula
    assert_same(weights(ours), weights(hand), rtol=0, atol=2e-4)


# --- the largest sampler and the phases


def test_with_the_largest_alone_no_bit_of_training_changes():
    def run(callback):
        logged = {}

        class Logged(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                logged[trainer.global_step] = {k: v.item() for k, v in trainer.callback_metrics.items()}

        pl.seed_everything(3, verbose=False)
        module = users.ScheduledClassifier()  # with dropout and drop-path
        trainer = pl.Trainer(callbacks=[*callback, Logged()], max_epochs=2, **QUIET)
        trainer.fit(module, users.loader(shuffle=True), users.loader())
        return (
            weights(module),
            {**logged, "end": {k: v.item() for k, v in trainer.callback_metrics.items()}},
            torch.rand(3),
        )

    plain, ours = run([]), run([SupernetTraining(sampler="largest")])
    assert_same(plain[0], ours[0], rtol=0, atol=0)
    assert plain[1] == ours[1]
    assert torch.equal(plain[2], ours[2])


def test_students_leave_the_random_state_of_the_run_alone():
    def states(sampler):
        seen = []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                seen.append((torch.get_rng_state(), np.random.get_state()[1].copy()))  # noqa: NPY002

        pl.seed_everything(0, verbose=False)
        fit(
            users.AugmentingClassifier(),
            SupernetTraining(sampler=sampler, **AT_ONCE),
            callbacks=[Watch()],
            max_epochs=1,
        )
        return seen

    for (cpu, numpy), (other_cpu, other_numpy) in zip(states("largest"), states("sandwich"), strict=True):
        assert torch.equal(cpu, other_cpu)
        assert (numpy == other_numpy).all()


def test_warm_up_is_plain_training_and_the_sandwich_begins_at_its_step():
    plain, ours = users.PlainClassifier(), users.PlainClassifier()
    snapshots = {"plain": [], "ours": []}

    class Snapshot(pl.Callback):
        def __init__(self, name):
            self.name = name

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            snapshots[self.name].append(weights(pl_module))

    fit(plain, None, callbacks=[Snapshot("plain")], max_epochs=2)
    fit(
        ours,
        SupernetTraining(warmup=0.7, order=None, validate=()),
        callbacks=[Snapshot("ours")],
        max_epochs=2,
    )
    equal = [
        all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(snapshots["plain"], snapshots["ours"], strict=True)
    ]
    assert equal == [True] * 4 + [False] * 2  # 6 steps, floor(0.7 * 6) = 4 of warm-up


def test_the_smallest_network_learns():
    module = users.PlainClassifier(lr=3e-3)
    data = users.loader(users.images(96), 16)
    callback = SupernetTraining(warmup=0.25)
    fit(module, callback, data, max_epochs=12)
    supernet = callback.supernet
    x, y = users.images(96, seed=9).tensors
    with torch.no_grad(), supernet.using(supernet.space.smallest):
        assert (module.eval()(x).argmax(-1) == y).float().mean() > 0.8  # chance is 1/3


def test_a_run_that_ends_before_its_sandwich_says_so():
    with pytest.warns(
        UserWarning, match="ended after 3 optimizer steps, before its sandwich phase .*after 10"
    ):
        fit(users.PlainClassifier(), SupernetTraining(warmup=10), max_epochs=1)


def test_a_fraction_of_an_unknown_length_asks_for_steps_and_leaves_the_module_whole():
    module = users.PlainClassifier()
    kinds = [type(m) for m in module.modules()]
    with pytest.raises(ValueError, match="length is unknown.*number of optimizer steps"):
        fit(module, SupernetTraining(warmup=0.3), max_epochs=-1)
    assert [type(m) for m in module.modules()] == kinds


def test_several_members_share_the_users_own_pass():
    """Gradients of a step: the mean, over equal parts of the batch, of what each member alone would give."""
    module, twin = users.PlainClassifier(), users.PlainClassifier()
    twin.load_state_dict(module.state_dict())
    callback = SupernetTraining(sampler=nas.MultiArchitectural(parts=2), **AT_ONCE)
    fit(module.double(), callback, max_steps=2, precision="64-true")

    supernet, optimizer = nas.Supernet(twin.double().net), twin.configure_optimizers()
    seed = int(np.random.SeedSequence([0, 0]).generate_state(1)[0])
    for step, (x, y) in enumerate(list(users.loader())[:2]):
        optimizer.zero_grad()
        members = callback.sampler.mixture(supernet.space, seed, step, len(x))
        size = len(x) // 2
        for i, member in enumerate(members):
            part = slice(i * size, (i + 1) * size)
            with supernet.using(member):
                (F.cross_entropy(twin.net(x[part].double()), y[part]) / 2).backward()
        optimizer.step()
    assert_same(weights(module), weights(twin), rtol=1e-6, atol=1e-9)
    assert type(callback.supernet.model.blocks[0].mlp.fc2).__name__ == "ElasticLinear"
    assert set(callback.curves) <= {"mixture"}
    assert sum(callback.trained.values()) > 0


def test_students_are_compared_by_the_logits_of_a_head_behind_the_network():
    """A network without a head, and a head of the user's own: gradients as of a loop over both."""

    class OwnHead(users.PlainClassifier):
        def __init__(self):
            super().__init__(users.tiny_vit(num_classes=0))
            torch.manual_seed(1)
            self.top = torch.nn.Linear(16, users.CLASSES)

        def forward(self, x):
            return self.top(self.net(x))

    module, twin = OwnHead().double(), OwnHead().double()
    callback = SupernetTraining(head="top", sampler=nas.Sandwich(random=1), **AT_ONCE)
    fit(module, callback, max_steps=3, precision="64-true")

    supernet, optimizer = nas.Supernet(twin.net), twin.configure_optimizers()
    for step, (x, y) in enumerate(list(users.loader())[:3]):
        optimizer.zero_grad()
        teacher = twin(x.double())
        F.cross_entropy(teacher, y).backward()
        for member in callback.sampler.students(supernet.space, 0, step, 0.0):
            with supernet.using(member):
                student = twin(x.double())
                soft = cross_entropy_of_soft_targets(student, teacher)
                (0.5 * F.cross_entropy(student, y) + 0.5 * soft).backward()
        optimizer.step()
    assert_same(weights(module), weights(twin), rtol=1e-6, atol=1e-9)


def test_a_head_is_refused_where_students_do_not_run_it():
    with pytest.raises(ValueError, match=r"head='top' needs students that run training_step.*Use 'both'"):
        SupernetTraining(head="top", students_learn_from="teacher")
    with pytest.raises(nas.NoMatchError, match=r"no sub-module 'tip'. Nearest names: "):
        fit(users.PlainClassifier(), SupernetTraining(head="tip", **AT_ONCE), max_steps=1)
