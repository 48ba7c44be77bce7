"""Each feature of the Trainer with each of our callbacks: it works, or is refused with a reason and a remedy.

``docs/compatibility.md`` is rendered from the table below: ``python -m tests.callbacks.test_compatibility``.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import Binarization, InstaTune, SupernetTraining
from pytorch_lightning import callbacks as lightning
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_avg_fn
from transformers import BertConfig, BertForSequenceClassification

import lightning_nas as nas
from tests import user_modules as users
from tests.callbacks.test_supernet_training import QUIET, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:(SupernetTraining|InstaTune).*for the second time"),
    pytest.mark.filterwarnings("ignore:Binarization. [0-9]+ parameters of binary layers are not trained"),
]

FAMILIES = ("SupernetTraining", "InstaTune")
KINDS = (*FAMILIES, "Binarization")
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BATCHES, EPOCHS, WARMUP = 4, 2, 3
STEPS = BATCHES * EPOCHS
STUDENTS = 2  # a step: the smallest and a random one


# --- what a cell of the table is


class Record(pl.Callback):
    """What happened in a run, seen from outside."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.largest_entries: list[float] = []
        self.validated: list[dict[str, float]] = []  # what the user's own validations logged
        self.batches = self.sanity_checks = 0
        self.rates: list[float] = []  # at the start of each batch
        self.biases: list[torch.Tensor] = []  # of the last layer, which no reordering moves, after each step
        self.epoch_starts: list[torch.Tensor] = []

    def on_train_start(self, trainer, pl_module):
        def look(optimizer, *args):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients = [p.grad for p in parameters if p.grad is not None]
            self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
            self.largest_entries.append(max(g.abs().max().item() for g in gradients))

        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(look)

    def on_train_epoch_start(self, trainer, pl_module):
        if (bias := last_bias(pl_module)) is not None:
            self.epoch_starts.append(bias)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += 1
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (bias := last_bias(pl_module)) is not None:
            self.biases.append(bias)

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            self.sanity_checks += 1
        else:
            self.validated.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def last_bias(module):
    found = [p.detach().clone() for name, p in module.named_parameters() if name.endswith("head.bias")]
    return found[0] if found else None


@dataclass
class Cell:
    """One run of one feature with one of our callbacks."""

    feature: Feature
    kind: str
    module: pl.LightningModule
    ours: SupernetTraining | Binarization
    trainer: pl.Trainer
    record: Record
    extras: list[pl.Callback]
    loaders: tuple[Any, Any]

    def fit(self, **keywords: Any) -> None:
        self.trainer.fit(self.module, *self.loaders, **keywords)


def image_logits(network, batch):
    return network(batch[0])


def nothing_more(cell):
    pass


@dataclass(frozen=True)
class Feature:
    """A row of the table: how to build the run, and what is claimed about it.

    Args:
        name: as the table shows it.
        claim: about the finished run, beyond what is claimed of every one.
        settings: of the Trainer.
        extras: makes further callbacks.
        module: makes the user's module.
        ours: arguments of our callback.
        batch: makes an example out of the images and labels.
        logits: of a network for one batch.
        steps: optimizer steps that the run takes.
        validations: validation loaders.
        monitor: what InstaTune maximises.
        run: how the run is started.
        refused: for the callbacks that refuse it, the reason as the table shows it.
        message: what the refusal says: the reason and the remedy, as a pattern.
        untested: for the callbacks with which it cannot be tried here, why.
        needs: a package that may not be installed.
        is_slow: whether it takes more than 5 s.
    """

    name: str
    claim: Callable[[Cell], None] = nothing_more
    settings: dict[str, Any] = field(default_factory=dict)
    extras: Callable[[], Sequence[pl.Callback]] = tuple
    module: Callable[[], pl.LightningModule] = users.PlainClassifier
    ours: dict[str, Any] = field(default_factory=dict)
    data: Callable[[int], Any] = users.images
    logits: Callable[[nn.Module, Any], torch.Tensor] = image_logits
    steps: int = STEPS
    validations: int = 1
    monitor: str = "val_acc"
    run: Callable[[Cell], None] = Cell.fit
    refused: dict[str, str] = field(default_factory=dict)
    message: str = ""
    untested: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    is_slow: bool = False

    def callback(self, kind: str, **changes: Any) -> SupernetTraining | Binarization:
        if kind == "Binarization":
            own = {name: value for name, value in self.ours.items() if name == "network"}
            include = None
            if "compile" in self.name:  # each layer takes a second
                include = "0.intermediate.dense" if "text" in self.name else "0.mlp.fc1"
            settings = {"activations": 1, "schedule_steps": STEPS, "log_every": 2, "include": include}
            return Binarization(**{**settings, **own, **changes})
        arguments = {"warmup": WARMUP, "sampler": nas.Sandwich(random=STUDENTS - 1)} | self.ours | changes
        if kind == "SupernetTraining":
            return SupernetTraining(**{"validate": ("smallest",), **arguments})
        search = {
            "monitor": self.monitor,
            "budget": 3,
            "costs": ("params",),
            "storage": "memory",
            "validate": (),
        }
        return InstaTune(**{**search, **arguments})

    def cell(self, kind: str) -> Cell:
        record, ours, extras = Record(), self.callback(kind), list(self.extras())
        settings = {**QUIET, "max_epochs": EPOCHS, **self.settings}
        settings = {name: value() if name in ("plugins", "strategy", "logger") and callable(value) else value
                    for name, value in settings.items() if value is not ...}  # fmt: skip
        trainer = pl.Trainer(callbacks=[ours, *extras, record], **settings)
        train = users.loader(self.data(8 * BATCHES))
        validation = [users.loader(self.data(16)) for _ in range(self.validations)]
        loaders = (train, validation[0] if len(validation) == 1 else validation)
        return Cell(self, kind, self.module(), ours, trainer, record, extras, loaders)


def hooks_of(module):
    return {
        name: {kind: len(hooks) for kind, hooks in vars(child).items() if kind.endswith("_hooks") and hooks}
        for name, child in module.named_modules()
    }


def kinds_of(module):
    return {name: type(child) for name, child in module.named_modules()}


def plain_module(feature):
    module = feature.module()
    module.configure_model()
    return module


def batches(loader):
    return list(loader[0] if isinstance(loader, list) else loader)


def of_families(claim):
    """A claim about subnetworks."""
    claim.is_of_families = True
    return claim


def assert_works(cell):
    """What is claimed of every cell that works."""
    if cell.kind == "Binarization":
        assert_is_binary(cell)
        return
    ours, supernet, feature = cell.ours, cell.ours.supernet, cell.feature
    warmup = ours.phases.warmup_steps
    assert cell.trainer.global_step == feature.steps
    assert ours.sandwich_steps == feature.steps - warmup > 0
    assert ours.ordered == (ours.order is not None)
    assert supernet.active == supernet.space.largest
    feature.claim(cell)
    if cell.kind == "InstaTune":
        assert_front_is_true(cell)
    plain = plain_module(feature)
    assert hooks_of(cell.module) == hooks_of(plain)
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in cell.trainer.optimizers)
    network, batch = supernet.model.eval(), batches(cell.loaders[1])[0]
    with torch.no_grad():
        before = feature.logits(network, batch)
        supernet.release()
        assert torch.equal(feature.logits(network, batch), before)
    assert kinds_of(cell.module) == kinds_of(plain)
    assert cell.module.state_dict().keys() == plain.state_dict().keys()


def assert_is_binary(cell):
    """What is claimed of a run of Binarization: trained by its codes, and released whole."""
    ours, feature = cell.ours, cell.feature
    assert cell.trainer.global_step == feature.steps
    assert ours.progress == 1
    if not getattr(feature.claim, "is_of_families", False):
        feature.claim(cell)
    plain = plain_module(feature)
    assert len(ours.layers) >= (1 if ours.include else 12)
    for name, layer in ours.layers.items():
        assert set(layer.binary_weight.unique().tolist()) == {-1.0, 1.0}
        assert name in ours.watcher.measured or cell.trainer.global_step < 2
    for callback in (ours, *(c for c in cell.extras if isinstance(c, Binarization))):
        nas.binary.release(callback.model)
    assert hooks_of(cell.module) == hooks_of(plain)
    assert kinds_of(cell.module) == kinds_of(plain)
    assert cell.module.state_dict().keys() == plain.state_dict().keys()


def assert_front_is_true(cell):
    """The accuracies on the front are those of the extracted networks, measured by a loop of a few lines."""
    front, data = cell.ours.result.front, batches(cell.loaders[1])
    limit = cell.trainer.limit_val_batches
    data = data[:limit] if isinstance(limit, int) else data
    assert len(front) > 0
    for candidate in front:
        network, right, count = cell.ours.extract(candidate).eval(), 0, 0
        assert sum(p.numel() for p in network.parameters()) == candidate.values["params"]
        with torch.no_grad(), cell.trainer.precision_plugin.forward_context():
            for batch in data:
                labels = list(batch.values())[-1] if isinstance(batch, dict) else batch[-1]
                right += (cell.feature.logits(network, batch).argmax(-1) == labels).sum().item()
                count += len(labels)
        assert candidate.values[cell.feature.monitor] == pytest.approx(right / count, abs=1e-6)


# --- modules and runs of single rows


class WithPlateau(users.PlainClassifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Scripted(users.PlainClassifier):
    """Its validation score rises once, whatever the network does."""

    def on_validation_epoch_end(self):
        self.log("score", [1.0, 2.0, 1.5, 1.7, 9.0][self.current_epoch])


class TextClassifier(pl.LightningModule):
    """A BERT that is called with keywords, and pads no further than the longest text of a batch."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16, "vocab_size": 12}
        torch.manual_seed(0)
        self.bert = BertForSequenceClassification(
            BertConfig(num_hidden_layers=3, num_attention_heads=4, num_labels=users.CLASSES, **sizes)
        )

    def forward(self, batch):
        return self.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch).argmax(-1) == batch["labels"]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class SeesPrecision(pl.LightningModule):
    """Notes in what precision a network answers, in a place that is not put back after a student."""

    def __init__(self):
        super().__init__()
        self.seen = ([],)

    def forward(self, x):
        logits = super().forward(x)
        if self.training:
            self.seen[0].append(logits.dtype)
        return logits


class ImagesSeenInPrecision(SeesPrecision, users.PlainClassifier):
    pass


class TextsSeenInPrecision(SeesPrecision, TextClassifier):
    pass


class TextsCompiled(TextClassifier):
    def __init__(self):
        super().__init__()
        self.bert = torch.compile(self.bert, backend="eager", dynamic=True)


class TextsCheckpointed(TextClassifier):
    def __init__(self):
        super().__init__()
        self.bert.gradient_checkpointing_enable()


class Convolutional(users.PlainClassifier):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(ResNet(BasicBlock, (1,) * 4, users.CLASSES, in_chans=1, channels=(8,) * 4))


class Compiled(users.PlainClassifier):
    def __init__(self):
        super().__init__(torch.compile(users.tiny_vit(), backend="eager"))


class CompiledInPlace(users.PlainClassifier):
    def __init__(self):
        super().__init__()
        self.net.compile(backend="eager")


class Checkpointed(users.PlainClassifier):
    def __init__(self):
        super().__init__()
        self.net.set_grad_checkpointing()


class PartlyFrozen(users.PlainClassifier):
    def __init__(self):
        super().__init__()
        self.net.patch_embed.requires_grad_(False)
        self.net.blocks[0].requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class TwoStudents(pl.LightningModule):
    """Two networks that are trained together."""

    def __init__(self):
        super().__init__()
        self.a, self.b = users.tiny_vit(0), users.tiny_vit(1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.a(x), y) + F.cross_entropy(self.b(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self.a(x).argmax(-1) == y).float().mean())
        self.log("val_acc_b", (self.b(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Evaluated(users.PlainClassifier):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class Manual(users.PlainClassifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def optimized_by(kind, **settings):
    class Module(users.PlainClassifier):
        def configure_optimizers(self):
            return kind(self.parameters(), **settings)

    return Module


class Texts(torch.utils.data.Dataset):
    """Texts by length, each padded to the longest of its batch of 8; the class shows in their tokens."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.items = []
        for i in range(count):
            longest = 5 + i // 8 * 3 % 8
            mask = (torch.arange(longest) < longest - i % 3).long()
            ids = torch.randint(1, 4, (longest,), generator=generator) + 3 * (i % users.CLASSES)
            self.items.append({"input_ids": ids * mask, "attention_mask": mask, "labels": i % users.CLASSES})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Stream(torch.utils.data.IterableDataset):
    """Data without a length."""

    def __init__(self, count):
        self.data = users.images(count)

    def __iter__(self):
        return iter([self.data[i] for i in range(len(self.data))])


class Images(pl.LightningDataModule):
    def train_dataloader(self):
        return users.loader(users.images(8 * BATCHES))

    def val_dataloader(self):
        return users.loader(users.images(16))


class AccumulatesItself(SingleDeviceStrategy):
    """Stands for DeepSpeed."""

    @property
    def handles_gradient_accumulation(self):
        return True


def interrupted_and_resumed(cell):
    """The same run in two Trainers, the second from a checkpoint in the middle of the second epoch."""
    keep = lightning.ModelCheckpoint("kept", "{step}", every_n_train_steps=6, save_top_k=-1)
    first = cell.feature.callback(cell.kind)
    settings = {**QUIET, "max_epochs": EPOCHS, "enable_checkpointing": True}
    pl.Trainer(callbacks=[first, keep], **settings).fit(cell.feature.module(), *cell.loaders)
    with pytest.warns(UserWarning, match="dataloader is not resumable"):
        cell.fit(ckpt_path="kept/step=6.ckpt")


def twice(cell):
    cell.fit()
    first = getattr(cell.ours, "sandwich_steps", None)
    assert first is None or first == STEPS - WARMUP
    cell.trainer.fit_loop.max_epochs = EPOCHS + 1
    cell.fit()


def both_networks(cell):
    monitor = {"monitor": "val_acc_b"} if cell.kind == "InstaTune" else {}
    other = cell.feature.callback(cell.kind, network="b", **monitor)
    cell.extras.append(other)
    cell.trainer.callbacks = [other, *cell.trainer.callbacks]
    cell.fit()


def from_yaml(cell):
    from pytorch_lightning.cli import LightningCLI

    search = {"monitor": "val_acc", "budget": 3, "costs": ["params"], "storage": "memory"}
    arguments = {
        "warmup": WARMUP,
        "sampler": {"class_path": "lightning_nas.Sandwich", "init_args": {"random": 1}},
        "students_learn_from": "task",
        "validate": [],
        **(search if cell.kind == "InstaTune" else {}),
    }
    if cell.kind == "Binarization":
        reste = {"class_path": "lightning_nas.estimators.ReSTE", "init_args": {"power": 2.0}}
        stages = [[0.0, {"activations": 32}], [0.5, {"activations": 1}]]
        arguments = {
            "estimator": reste,
            "activations": 1,
            "stages": stages,
            "distill_from": "float",
            "log_every": 2,
        }
    ours = {"class_path": f"lightning_nas.callbacks.{cell.kind}", "init_args": arguments}
    trainer = {**QUIET, "max_epochs": EPOCHS, "callbacks": [ours]}
    Path("run.yaml").write_text(json.dumps({"trainer": trainer, "model": {"lr": 0.01}}))  # JSON is YAML
    cli = LightningCLI(users.PlainClassifier, Images, args=["fit", "--config", "run.yaml"])
    cell.module, cell.trainer = cli.model, cli.trainer
    cell.ours = next(c for c in cli.trainer.callbacks if isinstance(c, SupernetTraining | Binarization))


def whole_module_compiled(cell):
    cell.trainer.fit(torch.compile(cell.module, backend="eager"), *cell.loaders)


def deterministically(cell):
    try:
        cell.fit()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# --- claims of single rows


def gradients_have_norms_up_to(limit):
    def claim(cell):
        assert len(cell.record.norms) == STEPS
        assert max(cell.record.norms) <= limit * (1 + 1e-4)

    return claim


def gradients_have_entries_up_to(limit):
    def claim(cell):
        assert max(cell.record.largest_entries) <= limit * (1 + 1e-6)

    return claim


def students_in(passes):
    """Every student has exactly one depth, so depths count students: two in each micro-batch."""

    @of_families
    def claim(cell):
        depths = next(c.values for c in cell.ours.supernet.space.choices if c.name == "depth")
        assert sum(cell.ours.trained[f"depth={depth}"] for depth in depths) == STUDENTS * passes

    return claim


def every_pass_runs_in_bfloat16(cell):
    students = STUDENTS * (STEPS - WARMUP) if cell.kind in FAMILIES else 0
    assert {p.dtype for p in cell.module.parameters()} == {torch.float32}
    assert cell.module.seen[0] == [torch.bfloat16] * (STEPS + students)


def scale_has_grown(cell):
    # A step with an infinite gradient would have halved it: 8 clean steps double it 4 times.
    assert cell.trainer.precision_plugin.scaler.get_scale() == 1024.0 * 2**4


def rates_are(*expected):
    def claim(cell):
        assert cell.record.rates == pytest.approx(expected)

    return claim


def plateau_saw_the_largest_networks_losses(cell):
    (config,) = cell.trainer.lr_scheduler_configs
    losses = [values["val_loss"] for values in cell.record.validated]
    assert len(losses) == EPOCHS
    assert float(config.scheduler.best) == pytest.approx(min(losses))
    assert config.scheduler.last_epoch == EPOCHS


def ends_with_the_moving_average(cell):
    expected = cell.record.biases[0]
    for bias in cell.record.biases[1:]:
        expected = expected + 0.5 * (bias - expected)
    torch.testing.assert_close(last_bias(cell.module), expected, rtol=1e-5, atol=1e-6)


def ends_with_the_mean_of_epoch_starts(cell):
    expected = torch.stack(cell.record.epoch_starts).mean(0)
    torch.testing.assert_close(last_bias(cell.module), expected, rtol=1e-5, atol=1e-6)


def stopped_at_the_users_own_score(cell):
    (stopping,) = (c for c in cell.extras if isinstance(c, lightning.EarlyStopping))
    assert stopping.stopped_epoch == 3  # 2.0, then two epochs without better
    assert float(stopping.best_score) == 2.0
    assert [values["score"] for values in cell.record.validated] == pytest.approx([1.0, 2.0, 1.5, 1.7])


def checkpoints_are_of_the_plain_module(cell):
    (saver,) = (c for c in cell.extras if isinstance(c, lightning.ModelCheckpoint))
    files = sorted(Path("kept").glob("*.ckpt"))
    accuracies = [values["val_acc"] for values in cell.record.validated]
    assert len(files) == 2
    assert float(saver.best_model_score) == pytest.approx(max(accuracies))
    for file in files:
        saved = torch.load(file, weights_only=True)["state_dict"]
        plain = plain_or_binary(cell)
        assert list(saved) == list(plain.state_dict())
        plain.load_state_dict(saved)
        right, x, y = accuracies[int(file.stem.split("=")[1])], *users.images(16).tensors
        with torch.no_grad():
            assert (plain.eval()(x).argmax(-1) == y).float().mean().item() == pytest.approx(right)
    assert cell.ours.state_key in torch.load(files[0], weights_only=True)["callbacks"]


def plain_or_binary(cell):
    """A module of the plain class, binary as a user would make it."""
    plain = users.PlainClassifier()
    return plain if cell.kind in FAMILIES else with_codes(plain)


def with_codes(module):
    nas.binarize(module.net, activations=1)
    return module


def monitor_logged_the_users_rates(cell):
    logged = [metrics["lr-Adam"] for metrics in cell.trainer.logger.lines if "lr-Adam" in metrics]
    assert logged == [1e-2] * STEPS


def searched_twice_and_wrote_nothing(cell):
    assert not list(Path().rglob("instatune"))
    if cell.kind == "InstaTune":
        assert len(cell.ours.result.candidates) <= 2


def saw_batches(count):
    def claim(cell):
        assert cell.record.batches == count

    return claim


def validated(count):
    def claim(cell):
        assert len(cell.record.validated) == count

    return claim


def said_nothing_of_the_sanity_check(cell):
    assert cell.record.sanity_checks == 1
    assert all("/" not in name for metrics in cell.trainer.logger.lines[:1] for name in metrics)
    assert len(cell.record.validated) == EPOCHS


def keeps_its_compiled_wrapper(cell):
    wrapper = cell.module.net
    network = cell.ours.supernet.model if cell.kind in FAMILIES else cell.ours.model
    assert wrapper._orig_mod is network
    x = users.images(16).tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(wrapper.eval()(x), network.eval()(x))


def recomputes_in_blocks(cell):
    assert cell.module.net.grad_checkpointing


def recomputes_in_layers(cell):
    assert cell.module.bert.is_gradient_checkpointing


def frozen_weights_stay(cell):
    assert not any(p.requires_grad for p in cell.module.net.blocks[0].parameters())
    plain = users.PlainClassifier().net.patch_embed.proj.weight
    assert torch.equal(cell.module.net.patch_embed.proj.weight, plain)


def both_loaders_were_logged(cell):
    assert {"val0_acc", "val1_acc", "best_acc"} <= cell.record.validated[-1].keys()


def rows_of_the_csv_file_hold_users_values_and_ours(cell):
    with (Path(cell.trainer.logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    accuracies = [float(row["val_acc"]) for row in rows if row.get("val_acc")]
    assert accuracies == pytest.approx([values["val_acc"] for values in cell.record.validated])
    if cell.kind == "Binarization":
        rates = [float(row["binary/flip_rate"]) for row in rows if row.get("binary/flip_rate")]
        assert len(rates) == STEPS // 2 - 1  # the first look has nothing to compare with
        return
    losses = [float(row["supernet_loss/smallest"]) for row in rows if row.get("supernet_loss/smallest")]
    assert losses == pytest.approx([value for _, value in cell.ours.curves["smallest"]])
    assert len(losses) == STEPS - WARMUP


def the_offline_run_holds_table_front_and_settings(cell):
    import wandb

    wandb.finish()
    (run,) = Path("wandb").glob("offline-run-*")
    written = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    binary = next(run.glob("*.wandb")).read_bytes()
    assert (b"supernet_loss/smallest" if cell.kind in FAMILIES else b"binary/flip_rate") in binary
    assert b"val_acc" in binary
    if cell.kind == "InstaTune":
        (table,) = [path for path in written if "candidates_table" in path and path.endswith(".json")]
        rows = json.loads((run / table).read_text())
        assert len(rows["data"]) == len(cell.ours.result.candidates)
        assert {"val_acc", "params"} <= set(rows["columns"])
        assert [path for path in written if "front" in path and path.endswith(".png")]
        assert b"instatune" in binary  # the settings
        assert b"warmup_steps" in binary


def event_file_is_written(cell):
    assert list(Path(cell.trainer.logger.log_dir).glob("events.out.tfevents.*"))


def the_largest_is_tested_and_predicts(cell):
    x, y = users.images(16).tensors
    validation = cell.loaders[1]
    expected = F.cross_entropy(cell.module.eval()(x), y).item()
    (values,) = cell.trainer.test(cell.module, validation, verbose=False)
    assert values["test_loss"] == pytest.approx(expected, rel=1e-5)
    predicted = torch.cat(cell.trainer.predict(cell.module, validation))
    with torch.no_grad():
        torch.testing.assert_close(predicted, cell.module.eval()(x), rtol=0, atol=1e-6)
    if cell.kind in FAMILIES:
        assert cell.ours.supernet.active == cell.ours.supernet.space.largest


def both_were_trained(cell):
    (other,) = cell.extras
    if cell.kind == "Binarization":
        assert (cell.ours.model, other.model) == (cell.module.a, cell.module.b)
        return
    assert other.sandwich_steps == cell.ours.sandwich_steps
    assert other.supernet.model is cell.module.b
    assert cell.ours.supernet.model is cell.module.a
    if cell.kind == "InstaTune":
        assert {"val_acc", "val_acc_b"} <= other.result.front[0].values.keys()
        assert len(list(Path().rglob("front.png"))) == 2  # neither wrote over the other's
    other.supernet.release()


def weights_are_double(cell):
    assert {p.dtype for p in cell.module.parameters()} == {torch.float64}


class Lines(Logger):
    """Keeps what was logged, in order."""

    name, version = "lines", 0

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.lines.append(dict(metrics))


def every_family(reason):
    return dict.fromkeys(FAMILIES, reason)


def scaler():
    growing = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    return MixedPrecision("16-mixed", "cpu", growing)


def texts(name, claim, settings=None, **more):
    """A row of a text encoder."""
    return Feature(
        f"text encoder, batches of many lengths{name}",
        claim,
        settings or {},
        data=Texts,
        logits=lambda network, batch: network(**{k: v for k, v in batch.items() if k != "labels"}).logits,
        **{"module": TextClassifier, **more},
    )


LOGGED = {"logger": Lines, "log_every_n_steps": 1}


def is_installed(package):
    return not package or importlib.util.find_spec(package) is not None


FEATURES = [
    Feature("a plain run", saw_batches(STEPS)),
    Feature("gradient clipping by norm", gradients_have_norms_up_to(0.1), {"gradient_clip_val": 0.1}),
    Feature(
        "gradient clipping by value",
        gradients_have_entries_up_to(0.01),
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    Feature(
        "gradient accumulation",
        students_in(5),  # one micro-batch at the end of the first epoch, four in the second
        {"accumulate_grad_batches": 3},
        steps=4,
        ours={"warmup": 1},
    ),
    Feature(
        "`GradientAccumulationScheduler`",
        students_in(5),
        extras=lambda: [lightning.GradientAccumulationScheduler({0: 1, 1: 2})],
        steps=6,
    ),
    Feature(
        '`precision="bf16-mixed"`',
        every_pass_runs_in_bfloat16,
        {"precision": "bf16-mixed"},
        module=ImagesSeenInPrecision,
    ),
    Feature('`precision="16-mixed"` with a gradient scaler', scale_has_grown, {"plugins": scaler}),
    Feature(
        '`precision="64-true"`',
        weights_are_double,
        {"precision": "64-true"},
        logits=lambda network, batch: network(batch[0].to(next(network.parameters()).dtype)),
    ),
    Feature(
        "several schedulers",
        rates_are(*[1e-2 * 0.9**k * 0.5 ** (k // BATCHES) for k in range(STEPS)]),
        module=users.ScheduledClassifier,
    ),
    Feature("`ReduceLROnPlateau`", plateau_saw_the_largest_networks_losses, module=WithPlateau),
    Feature(
        "`WeightAveraging` (EMA), before ours",
        ends_with_the_moving_average,
        extras=lambda: [lightning.WeightAveraging(avg_fn=get_ema_avg_fn(0.5))],
        refused={"Binarization": "the copy lacks the scales; give `Binarization` first"},
        message="WeightAveraging has copied.*Give Binarization before",
        run=lambda cell: (cell.trainer.callbacks.sort(key=lambda c: c is cell.ours), cell.fit()),
    ),
    Feature(
        "`WeightAveraging` (EMA), after ours",
        ends_with_the_moving_average,
        extras=lambda: [lightning.WeightAveraging(avg_fn=get_ema_avg_fn(0.5))],
    ),
    Feature(
        "`EMAWeightAveraging`",
        ends_with_the_moving_average,
        extras=lambda: [lightning.EMAWeightAveraging(decay=0.5)],
    ),
    Feature(
        "`StochasticWeightAveraging`",
        ends_with_the_mean_of_epoch_starts,
        extras=lambda: [lightning.StochasticWeightAveraging(1e-2, swa_epoch_start=1)],
    ),
    Feature(
        "`EarlyStopping`",
        stopped_at_the_users_own_score,
        {"max_epochs": 5},
        lambda: [lightning.EarlyStopping("score", mode="max", patience=2)],
        Scripted,
        steps=4 * BATCHES,
    ),
    Feature(
        "`ModelCheckpoint(monitor=..., save_top_k=2)`",
        checkpoints_are_of_the_plain_module,
        {"max_epochs": 3, "enable_checkpointing": True},
        lambda: [lightning.ModelCheckpoint("kept", "{epoch}", monitor="val_acc", mode="max", save_top_k=2)],
        steps=3 * BATCHES,
    ),
    Feature("checkpoint in the middle of an epoch, and resume", run=interrupted_and_resumed),
    Feature(
        "`LearningRateMonitor`, with `lr_factor`",
        monitor_logged_the_users_rates,
        LOGGED,
        lambda: [lightning.LearningRateMonitor("step")],
        ours={"lr_factor": 3.0},
    ),
    Feature(
        "`fast_dev_run`",
        searched_twice_and_wrote_nothing,
        {"fast_dev_run": True},
        steps=1,
        ours={"warmup": 0.3},
    ),
    Feature("`overfit_batches`", saw_batches(4), {"overfit_batches": 2}, steps=4),
    Feature(
        "`limit_train_batches`, `limit_val_batches`",
        saw_batches(4),
        {"limit_train_batches": 2, "limit_val_batches": 1},
        steps=4,
    ),
    Feature("`val_check_interval`", validated(2 * EPOCHS), {"val_check_interval": 0.5}),
    Feature(
        "`check_val_every_n_epoch`", validated(1), {"check_val_every_n_epoch": 2, "max_epochs": 3}, steps=12
    ),
    Feature("`num_sanity_val_steps=0`", validated(EPOCHS), {"num_sanity_val_steps": 0}),
    Feature(
        "`num_sanity_val_steps=2`", said_nothing_of_the_sanity_check, {"num_sanity_val_steps": 2, **LOGGED}
    ),
    Feature("`max_steps`", saw_batches(6), {"max_steps": 6}, steps=6),
    Feature(
        "`max_time`, no other end",
        saw_batches(BATCHES),
        {"max_epochs": -1},
        lambda: [lightning.Timer(timedelta(milliseconds=1), interval="epoch")],
        steps=BATCHES,
    ),
    Feature("data without a length", saw_batches(STEPS), data=Stream),
    Feature(
        "`reload_dataloaders_every_n_epochs`", saw_batches(STEPS), {"reload_dataloaders_every_n_epochs": 1}
    ),
    Feature("`torch.compile`d network", keeps_its_compiled_wrapper, module=Compiled, is_slow=True),
    Feature("network compiled in place (`network.compile()`)", students_in(5), module=CompiledInPlace),
    Feature("`torch.compile`d module", students_in(5), run=whole_module_compiled, is_slow=True),
    Feature("gradient checkpointing", recomputes_in_blocks, module=Checkpointed),
    texts(", padded and masked", students_in(5)),
    texts(
        ', `precision="bf16-mixed"`',
        every_pass_runs_in_bfloat16,
        {"precision": "bf16-mixed"},
        module=TextsSeenInPrecision,
    ),
    texts(
        ", gradient accumulation", students_in(5), {"accumulate_grad_batches": 3}, steps=4, ours={"warmup": 1}
    ),
    texts(", gradient checkpointing", recomputes_in_layers, module=TextsCheckpointed),
    texts(", `torch.compile`d network", students_in(5), module=TextsCompiled, is_slow=True),
    Feature("frozen blocks", frozen_weights_stay, module=PartlyFrozen),
    Feature("network made in `configure_model`", students_in(5), module=users.ConfiguredLate),
    Feature(
        "dict batches, network called with keywords",
        students_in(5),
        module=users.DictBatches,
        data=users.DictImages,
        logits=lambda network, batch: network(x=batch["image"]),
    ),
    Feature("network that returns a tuple", students_in(5), module=users.TupleOutputs),
    Feature(
        "network that returns a dataclass",
        students_in(5),
        module=users.DataclassOutput,
        data=lambda count: users.DictImages(count, ("pixel_values", "labels")),
        logits=lambda network, batch: network(pixel_values=batch["pixel_values"]).logits,
    ),
    Feature(
        "several validation loaders",
        both_loaders_were_logged,
        module=users.MetricAttributes,
        validations=2,
        monitor="val0_acc",
    ),
    Feature("torchmetrics logged as objects", students_in(5), module=users.MetricObjects),
    Feature("`deterministic=True`", students_in(5), {"deterministic": True}, run=deterministically),
    Feature("`detect_anomaly=True`", students_in(5), {"detect_anomaly": True}),
    Feature("`inference_mode=False`", students_in(5), {"inference_mode": False}),
    Feature(
        "`barebones=True`",
        students_in(5),
        refused={"InstaTune": "such a Trainer logs nothing that could be searched by"},
        message="barebones.*leave barebones out",
        settings={
            "barebones": True,
            "logger": ...,
            "enable_checkpointing": ...,
            "enable_progress_bar": ...,
            "enable_model_summary": ...,
        },
    ),
    Feature(
        "progress bar of tqdm",
        validated(EPOCHS),
        {"enable_progress_bar": True},
        lambda: [lightning.TQDMProgressBar()],
    ),
    Feature(
        "progress bar of rich",
        validated(EPOCHS),
        {"enable_progress_bar": True},
        lambda: [lightning.RichProgressBar()],
    ),
    Feature(
        "`CSVLogger`",
        rows_of_the_csv_file_hold_users_values_and_ours,
        {"logger": lambda: CSVLogger("logs"), "log_every_n_steps": 1},
    ),
    Feature(
        "`TensorBoardLogger`",
        event_file_is_written,
        {"logger": lambda: TensorBoardLogger("logs")},
        needs="tensorboard",
    ),
    Feature(
        "`WandbLogger`, offline",
        the_offline_run_holds_table_front_and_settings,
        {"logger": lambda: WandbLogger(save_dir=Path.cwd(), offline=True), "log_every_n_steps": 1},
        needs="wandb",
    ),
    Feature(
        "`LightningCLI`, the callback written in YAML", students_in(5), run=from_yaml, needs="jsonargparse"
    ),
    Feature(
        "`trainer.test`, `trainer.predict` afterwards",
        the_largest_is_tested_and_predicts,
        module=Evaluated,
    ),
    Feature(
        "a second `fit` of the same Trainer", saw_batches(STEPS + BATCHES), run=twice, steps=STEPS + BATCHES
    ),
    Feature(
        "two of our callbacks on two networks",
        both_were_trained,
        module=TwoStudents,
        ours={"network": "a"},
        run=both_networks,
    ),
    Feature(
        "LBFGS, ordered at the start",
        module=optimized_by(torch.optim.LBFGS, lr=0.1, max_iter=2),
        ours={"warmup": 0},
    ),
    Feature(
        "Adafactor, not ordered", module=optimized_by(torch.optim.Adafactor, lr=1e-2), ours={"order": None}
    ),
    Feature(
        "manual optimization",
        module=Manual,
        refused=every_family("the step is the user's own"),
        message="manual optimization is not supported.*use automatic optimization",
    ),
    Feature(
        "DDP with `static_graph=True`",
        settings={"strategy": lambda: DDPStrategy(process_group_backend="gloo", static_graph=True)},
        refused=every_family("students add passes to the graph"),
        message="static_graph=True is not supported.*leave static_graph out",
    ),
    Feature(
        "`sync_batchnorm=True`, a network with batch norm",
        settings={
            "strategy": lambda: DDPStrategy(process_group_backend="gloo"),
            "sync_batchnorm": True,
        },
        module=Convolutional,
        refused=every_family("it replaces the norms, and statistics come from all processes anyway"),
        untested={"Binarization": "it needs a GPU"},
        message="sync_batchnorm=True replaces the batch norms.*leave it out",
    ),
    Feature(
        "strategies that accumulate gradients themselves (DeepSpeed)",
        settings={
            "strategy": lambda: AccumulatesItself(torch.device("cpu")),
            "accelerator": ...,
            "devices": ...,
        },
        refused=dict.fromkeys(KINDS, "the gradients are hidden, or the weights are sharded"),
        message="AccumulatesItself accumulates gradients itself.*use strategy='ddp'",
    ),
    Feature(
        "Adafactor, ordered in the middle of the run",
        module=optimized_by(torch.optim.Adafactor, lr=1e-2),
        refused=every_family("its state is not shaped like its parameters"),
        message="Adafactor keeps state.*order at the start.*or not at all",
    ),
    Feature(
        "LBFGS, ordered in the middle of the run",
        module=optimized_by(torch.optim.LBFGS, lr=0.1, max_iter=2),
        refused=every_family("its state is not shaped like its parameters"),
        message="LBFGS keeps state.*order at the start.*or not at all",
    ),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "feature",
    [
        pytest.param(
            feature,
            id=feature.name.replace("`", ""),
            marks=[pytest.mark.slow] * feature.is_slow
            + [
                pytest.mark.skipif(
                    not is_installed(feature.needs), reason=f"{feature.needs} is not installed"
                )
            ],
        )
        for feature in FEATURES
    ],
)
def test_each_feature_works_or_is_refused(feature, kind):
    if kind in feature.untested:
        pytest.skip(feature.untested[kind])
    cell = feature.cell(kind)
    if kind not in feature.refused:
        try:
            feature.run(cell)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        assert_works(cell)
        return
    kinds, hooks, before = kinds_of(cell.module), hooks_of(cell.module), weights(cell.module)
    try:
        with pytest.raises(nas.UnsupportedError, match=f"{kind}.*{feature.message}"):
            feature.run(cell)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert kinds_of(cell.module) == kinds
    assert hooks_of(cell.module) == hooks
    after = weights(cell.module)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (cell.ours.supernet if kind in FAMILIES else cell.ours.model) is None


# --- what the rows leave open


def test_a_search_orders_after_training_whatever_the_optimizer_keeps():
    feature = Feature("", module=optimized_by(torch.optim.Adafactor, lr=1e-2), ours={"sampler": "largest"})
    cell = feature.cell("InstaTune")
    cell.fit()
    assert cell.ours.ordered
    assert_front_is_true(cell)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_fraction_of_data_without_a_length_asks_for_steps(kind):
    cell = Feature("", data=Stream, ours={"warmup": 0.3}).cell(kind)
    with pytest.raises(ValueError, match=r"length is unknown.*number of optimizer steps"):
        cell.fit()
    assert kinds_of(cell.module) == kinds_of(users.PlainClassifier())


def test_a_module_trained_earlier_is_searched_by_a_trainer_that_never_trained():
    cell = Feature("").cell("InstaTune")
    pl.Trainer(max_epochs=1, **QUIET).fit(cell.module, *cell.loaders)
    before = weights(cell.module)
    result = cell.ours.search(pl.Trainer(**QUIET), cell.module, dataloaders=cell.loaders[1])
    assert len(result.candidates) == 3
    assert_front_is_true(cell)
    cell.ours.supernet.release()
    assert all(torch.equal(value, before[name]) for name, value in weights(cell.module).items())


class Tempered(type(users.tiny_vit())):
    """A network with an argument that must be given, by keyword, and is not a batch."""

    def forward(self, x, *, temperature):
        return super().forward(x) / temperature


class CallsWithBoth(users.PlainClassifier):
    """Calls its network with a positional argument and a keyword, a tensor without dimensions."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            Tempered(
                img_size=8,
                patch_size=4,
                in_chans=1,
                num_classes=users.CLASSES,
                embed_dim=16,
                depth=3,
                num_heads=4,
            )
        )

    def forward(self, x):
        return self.net(x, temperature=torch.tensor(2.0))


@pytest.mark.parametrize("cost", ["params", "macs"])
def test_costs_are_counted_on_the_very_arguments_of_the_users_call(cost):
    feature = Feature("", module=CallsWithBoth, ours={"warmup": 0})
    cell = feature.cell("InstaTune")
    cell.ours = feature.callback("InstaTune", costs=(cost,))
    cell.trainer.callbacks[0] = cell.ours
    cell.fit()
    assert cell.ours.result.front[0].values[cost] > 0


def test_under_lbfgs_each_evaluation_has_its_own_teacher():
    def module():
        return optimized_by(torch.optim.LBFGS, lr=0.1, max_iter=3)().double()

    ours, hand, sampler = module(), module(), nas.Sandwich(random=1)
    callback = SupernetTraining(
        warmup=0, order=None, validate=(), sampler=sampler, students_learn_from="teacher"
    )
    data = users.loader(users.images(16))
    pl.Trainer(callbacks=[callback], max_epochs=1, precision="64-true", **QUIET).fit(ours, data)
    supernet, optimizer = nas.Supernet(hand.net), hand.configure_optimizers()
    for step, (x, y) in enumerate(data):

        def closure(x=x, y=y, step=step):
            optimizer.zero_grad()
            x = x.double()
            largest = hand.net(x)
            loss = F.cross_entropy(largest, y)
            loss.backward()
            target = largest.detach().softmax(-1)
            for member in sampler.students(supernet.space, 0, step, 0.0):
                with supernet.using(member):
                    (-(target * hand.net(x).log_softmax(-1)).sum(-1).mean()).backward()
            return loss

        optimizer.step(closure)
    after = weights(ours)
    for name, value in weights(hand).items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# --- the page in the docs


def page() -> str:
    """The table as it stands in the docs."""
    lines = [
        "# Compatibility",
        "",
        "Each cell of this table is a test in `tests/callbacks/test_compatibility.py`, and this page is",
        "rendered from the same list by `python -m tests.callbacks.test_compatibility`.",
        "",
        "- *works*: students were trained, the largest network is active afterwards and computes what it",
        "  computes after `release()`, no hook is left on the module, the front of a search holds what the",
        "  extracted networks measure, and a claim of the feature's own holds. Of `Binarization`: weights",
        "  are codes afterwards, every layer was looked at, `release()` gives the plain classes back, no hook is",
        "  left, and the claim holds. With a teacher it refuses manual optimization and LBFGS.",
        "- *refused*: an `UnsupportedError` that names the reason and the remedy, before the first change.",
        "",
        f"| feature | {' | '.join(f'`{kind}`' for kind in KINDS)} |",
        f"|---|{'---|' * len(KINDS)}",
    ]
    for feature in FEATURES:
        cells = [
            f"refused: {feature.refused[kind]}"
            if kind in feature.refused
            else f"not tested: {feature.untested[kind]}"
            if kind in feature.untested
            else "works"
            for kind in KINDS
        ]
        lines.append(f"| {feature.name} | {' | '.join(cells)} |")
    lines.append(
        "| DDP on two processes, without `find_unused_parameters` (`test_ddp.py`) | works | works | works |"
    )
    return "\n".join(lines) + "\n"


def test_the_page_in_the_docs_is_the_table():
    assert PAGE.read_text() == page(), "run python -m tests.callbacks.test_compatibility"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
