"""Modules in the styles that users write them in: students learn, and what the user counts stays his own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SupernetTraining
from pytorch_lightning.loggers import Logger
from torch import nn
from torch.nn import functional as F

import lightning_nas as nas
from tests import user_modules as users
from tests.callbacks.test_supernet_training import QUIET, fit, weights

LEARN = ("teacher", "task", "both")
EPOCHS, BATCHES = 3, 6
STUDENTS = nas.Sandwich(random=1)


def called_twice_loss(logits, x, y):
    return F.cross_entropy(logits(x), y) + (logits(x) - logits(x.flip(-1))).square().mean()


@dataclass(frozen=True)
class Style:
    """One way of writing a module, and how to read its logits and its loss."""

    module: type[pl.LightningModule]
    logits: Callable[[pl.LightningModule, torch.Tensor], torch.Tensor] = lambda module, x: module.net(x)
    loss: Callable[..., torch.Tensor] = lambda logits, x, y: F.cross_entropy(logits(x), y)
    data: Callable[[int], torch.utils.data.Dataset] = users.images
    validations: int = 1
    network: str | None = None
    arguments: dict[str, float] = field(default_factory=dict)
    epochs: int = 3

    @property
    def steps(self) -> int:
        return self.epochs * BATCHES

    @property
    def sandwich_steps(self) -> int:
        return self.steps - int(0.3 * self.steps)

    def loaders(self) -> tuple[torch.utils.data.DataLoader, list[torch.utils.data.DataLoader]]:
        return users.loader(self.data(8 * BATCHES)), [
            users.loader(self.data(16)) for _ in range(self.validations)
        ]


STYLES = {
    "plain": Style(users.PlainClassifier),
    "scheduled": Style(users.ScheduledClassifier, arguments={"lr": 0.1}),
    "dict batches": Style(users.DictBatches, lambda module, x: module.backbone(x=x), data=users.DictImages),
    "tuple outputs": Style(users.TupleOutputs),
    "dataclass output": Style(
        users.DataclassOutput,
        lambda module, x: module.model(x).logits,
        data=lambda count: users.DictImages(count, ("pixel_values", "labels")),
    ),
    "metric attributes": Style(users.MetricAttributes, validations=2),
    "metric collection": Style(users.MetricCollectionInTraining),
    "metric objects": Style(users.MetricObjects),
    "augmenting": Style(users.AugmentingClassifier),
    "nested features": Style(users.NestedFeatures),
    "two networks": Style(users.TwoNetworks, lambda module, x: module.student(x), network="student"),
    "configured late": Style(users.ConfiguredLate),
    "called twice": Style(users.CalledTwice, loss=called_twice_loss, arguments={"lr": 5e-3}, epochs=6),
    "normalized head": Style(users.NormalizedHead, lambda module, x: module(x)),
}


class Memory(Logger):
    """Keeps what was logged, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[dict[str, float], int | None]] = []

    name, version = "memory", 0

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        self.lines.append((dict(metrics), step))

    def values(self, name: str) -> list[float]:
        return [metrics[name] for metrics, _ in self.lines if name in metrics]


class OwnPasses(pl.Callback):
    """What went into a layer and came out of it in the user's own training passes, not in those of students.

    The user's pass lies between the start of a batch and Lightning's backward.
    """

    def __init__(self, layer: Callable[[pl.LightningModule], nn.Module]) -> None:
        self.layer = layer
        self.calls: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # batch, input, output
        self.labels: list[torch.Tensor] = []
        self._is_own = False

    def on_train_start(self, trainer, pl_module):
        self.layer(pl_module).register_forward_hook(self._watch)

    def _watch(self, module, args, output):
        if self._is_own:
            self.calls.append((len(self.labels) - 1, args[0].detach().clone(), output.detach().clone()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.labels.append(batch[1])
        self._is_own = True

    def on_before_backward(self, trainer, pl_module, loss):
        self._is_own = False


def train(style, module, learn, *, callbacks=(), epochs=EPOCHS, sampler=STUDENTS, validate=(), **settings):
    callback = SupernetTraining(
        network=style.network, warmup=0.3, sampler=sampler, students_learn_from=learn, validate=validate
    )
    pl.seed_everything(0, verbose=False)
    logger = Memory()
    trainer = pl.Trainer(
        callbacks=[callback, *callbacks], max_epochs=epochs, log_every_n_steps=1,
        **{**QUIET, "logger": logger}, **settings,
    )  # fmt: skip
    trainer.fit(module, *style.loaders())
    return callback, trainer, logger


class Bookkeeping(pl.LightningModule):
    """Counts in every kind of attribute at each training step; ``truth`` is what nobody can put back."""

    def keep_books(self):
        self.truth = ([],)  # a tuple: it is not copied, and neither is what it holds
        self.steps, self.share = 0, 0.0
        self.order, self.last, self.by_step, self.met = [], deque(maxlen=3), {}, set()
        return self

    def training_step(self, batch, *batch_idx):
        self.truth[0].append(self.global_step)
        self.steps += 1
        self.share = self.share / 2 + 1
        self.order.append(self.steps)
        self.last.append(self.steps)
        self.by_step[self.global_step] = self.by_step.get(self.global_step, 0) + 1
        self.met.add(len(self.truth[0]))
        self.new = self.steps
        return super().training_step(batch, *batch_idx)


class BookkeepingWithoutIndex(Bookkeeping):
    def training_step(self, batch):
        return super().training_step(batch)


class Outputs(pl.Callback):
    """The losses of the run as Lightning hands them to callbacks."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


@dataclass
class Run:
    module: pl.LightningModule
    callback: SupernetTraining
    logger: Memory
    losses: list[float]

    def distance(self, style, learn):
        """Of the smallest network from what it was to learn: from the largest network, or from the labels."""
        (x, y), module, space = (
            users.images(8 * BATCHES).tensors,
            self.module.eval(),
            self.callback.supernet.space,
        )
        with torch.no_grad():
            largest = style.logits(module, x)
            with self.callback.supernet.using(space.smallest):
                if learn == "teacher":
                    smallest = style.logits(module, x).log_softmax(-1)
                    return F.kl_div(smallest, largest.softmax(-1), reduction="batchmean").item()
                return style.loss(partial(style.logits, module), x, y).item()


@cache  # several claims are made about each run
def run_of(name: str, learn: str, sampler: nas.Sandwich | nas.Largest) -> Run:
    style, outputs = STYLES[name], Outputs()
    books = BookkeepingWithoutIndex if name == "dataclass output" else Bookkeeping
    module = type("Counted", (books, style.module), {})(**style.arguments).keep_books()
    callback, _, logger = train(
        style, module, learn, callbacks=[outputs], sampler=sampler, epochs=style.epochs
    )
    return Run(module, callback, logger, outputs.losses)


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("name", STYLES)
def test_students_of_every_style_learn(name, learn):
    style, run = STYLES[name], run_of(name, learn, STUDENTS)
    assert run.callback.ordered
    assert run.callback.sandwich_steps == style.sandwich_steps
    assert len(run.logger.values("supernet_loss/smallest")) == style.sandwich_steps
    assert run.callback.supernet.active == run.callback.supernet.space.largest

    assert run.distance(style, learn) < run_of(name, "both", nas.Largest()).distance(style, learn)


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("name", STYLES)
def test_what_the_module_counts_is_counted_once_a_batch(name, learn):
    style, run = STYLES[name], run_of(name, learn, STUDENTS)
    module, steps = run.module, style.steps
    students = 0 if learn == "teacher" else 2 * style.sandwich_steps  # the smallest and a random one
    assert len(module.truth[0]) == steps + students
    assert module.steps == module.new == steps
    assert module.share == pytest.approx(2 - 2.0 ** (1 - steps))
    assert module.order == list(range(1, steps + 1))
    assert list(module.last) == [steps - 2, steps - 1, steps]
    assert module.by_step == dict.fromkeys(range(steps), 1)
    assert len(module.met) == steps
    assert "log" not in vars(module)  # not muted for good


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("name", [name for name in STYLES if "metric" not in name])
def test_the_logged_training_loss_is_that_of_the_users_own_steps(name, learn):
    run = run_of(name, learn, STUDENTS)
    assert run.logger.values("train_loss") == pytest.approx(run.losses, rel=1e-6)
    assert len(run.losses) == STYLES[name].steps


@pytest.mark.parametrize("validate", [(), ("smallest", "random")])
@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.filterwarnings("ignore:SupernetTraining.*for the second time")
def test_metrics_of_the_module_see_the_largest_network_only(learn, validate):
    module, own = users.MetricAttributes(), OwnPasses(lambda m: m.net)
    batches = EPOCHS * BATCHES
    _, trainer, logger = train(STYLES["metric attributes"], module, learn, callbacks=[own], validate=validate)
    assert len(own.calls) == batches
    outputs = [output for _, _, output in own.calls]
    right = [
        (output.argmax(-1) == y).float().mean().item() for output, y in zip(outputs, own.labels, strict=True)
    ]
    losses = [F.cross_entropy(output, y).item() for output, y in zip(outputs, own.labels, strict=True)]

    def by_epoch(values):
        return [sum(values[i : i + BATCHES]) / BATCHES for i in range(0, batches, BATCHES)]

    assert logger.values("train_acc_step") == pytest.approx(right)
    assert logger.values("train_acc_epoch") == pytest.approx(by_epoch(right))
    assert logger.values("epoch_loss") == pytest.approx(by_epoch(losses))
    assert logger.values("epoch_batches") == [BATCHES] * EPOCHS
    assert module.seen == 8 * batches
    assert module.training_losses == []
    assert len(logger.values("best_acc")) == EPOCHS
    best = max(logger.values("val0_acc"))
    assert trainer.callback_metrics["best_acc"].item() == pytest.approx(best)
    assert module.best_acc.compute().item() == pytest.approx(best)
    assert len(logger.values("val1_f1")) == EPOCHS
    if validate:
        assert (
            len(logger.values("val1_f1/smallest")) == EPOCHS
        )  # the first epoch ends with a step of the sandwich
        assert logger.values("val0_acc/largest") == pytest.approx(logger.values("val0_acc"))


@pytest.mark.parametrize("learn", LEARN)
def test_a_collection_that_shares_state_is_not_torn_apart(learn):
    module, own = users.MetricCollectionInTraining(), OwnPasses(lambda m: m.net)
    _, _, logger = train(STYLES["metric collection"], module, learn, callbacks=[own])
    for epoch in range(EPOCHS):
        outputs = torch.cat([output for i, _, output in own.calls if i // BATCHES == epoch])
        labels = torch.cat(own.labels[epoch * BATCHES : (epoch + 1) * BATCHES])
        right = (outputs.argmax(-1) == labels).float()
        expected = {
            "train_acc": right.mean(),
            "train_macro": torch.stack([right[labels == c].mean() for c in range(users.CLASSES)]).mean(),
            "train_loss": F.cross_entropy(outputs, labels),
        }
        for name, value in expected.items():
            assert logger.values(name)[epoch] == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("learn", LEARN)
def test_batch_norm_in_the_users_head_sees_the_largest_network_only(learn):
    module, own = users.NormalizedHead(), OwnPasses(lambda m: m.norm)
    train(STYLES["normalized head"], module, learn, callbacks=[own], validate=("smallest",))
    mean, variance = torch.zeros(16), torch.ones(16)
    for _, x, _ in own.calls:
        mean, variance = 0.9 * mean + 0.1 * x.mean(0), 0.9 * variance + 0.1 * x.var(0)
    assert module.norm.num_batches_tracked == EPOCHS * BATCHES
    torch.testing.assert_close(module.norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.norm.running_var, variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learn", LEARN)
def test_a_queue_takes_each_batch_once(learn):
    module, own = users.MomentumContrast(), OwnPasses(lambda m: m.key)
    style = Style(users.MomentumContrast, network="query", validations=0)
    train(style, module, learn, callbacks=[own])
    keys = torch.cat([F.normalize(output, dim=-1) for _, _, output in own.calls])
    length, total = 20, len(keys)
    assert total == 8 * EPOCHS * BATCHES
    assert module.start.item() == total % length
    expected = torch.empty(16, length)
    for i in range(total - length, total):  # a ring: the last ones are in it, each at its place
        expected[:, i % length] = keys[i]
    torch.testing.assert_close(module.queue, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learn", LEARN)
def test_an_encoder_that_follows_slowly_moves_once_a_step(learn):
    style = Style(users.MomentumContrast, network="query", validations=0)

    class ByHand(pl.Callback):
        """The same average, computed once a batch from the weights that the batch began with."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if not hasattr(self, "slow"):
                self.slow = [p.detach().clone() for p in pl_module.key.parameters()]
            for slow, fast in zip(self.slow, pl_module.query.parameters(), strict=True):
                slow.mul_(0.9).add_(fast.detach(), alpha=0.1)

    module, by_hand = users.MomentumContrast(), ByHand()
    callback = SupernetTraining(network="query", order=None, warmup=0.3, students_learn_from=learn)
    trainer = pl.Trainer(callbacks=[callback, by_hand], max_epochs=EPOCHS, **QUIET)
    trainer.fit(module, *style.loaders())
    for expected, found in zip(by_hand.slow, module.key.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learn", LEARN)
def test_what_the_module_writes_to_its_logger_itself_is_written_once_a_batch(learn):
    style = STYLES["plain"]
    _, _, logger = train(style, users.TalksToTheLogger(), learn)
    assert logger.values("own_loss") == pytest.approx(logger.values("train_loss"), rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("learn", LEARN)
def test_a_step_that_returns_none_trains_no_student(learn, accumulate):
    module, style = users.SkipsBatches(), STYLES["plain"]
    callback, trainer, logger = train(style, module, learn, accumulate_grad_batches=accumulate)
    steps = EPOCHS * BATCHES // accumulate
    assert trainer.global_step == steps
    passes = sum(  # micro-batches of the sandwich that returned a loss
        i % BATCHES % 2 == 0 and i // accumulate >= int(0.3 * steps) for i in range(EPOCHS * BATCHES)
    )
    depths = next(c for c in callback.supernet.space.choices if c.name == "depth").values
    assert (
        sum(callback.trained[f"depth={depth}"] for depth in depths) == 2 * passes
    )  # every student has a depth
    assert logger.values("supernet_loss/smallest")


@pytest.mark.parametrize("learn", LEARN)
def test_the_users_training_goes_on_after_students_with_the_same_learning_rates(learn):
    rates = {}

    class Watch(pl.Callback):
        def __init__(self, name):
            self.name = name

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.setdefault(self.name, []).append(
                [group["lr"] for group in trainer.optimizers[0].param_groups]
            )

    plain, ours, style = users.ScheduledClassifier(), users.ScheduledClassifier(), STYLES["scheduled"]
    fit(plain, None, style.loaders()[0], callbacks=[Watch("plain")], max_epochs=EPOCHS)
    train(style, ours, learn, callbacks=[Watch("ours")])
    assert rates["ours"] == rates["plain"]
    before, after = weights(plain), weights(ours)
    assert any(not torch.equal(before[name], after[name]) for name in before)
