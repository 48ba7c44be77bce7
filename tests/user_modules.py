"""LightningModules written the way users write them. They know nothing of this package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import timm.models.vision_transformer as vision_transformer
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

CLASSES = 3


def tiny_vit(seed: int = 0, **changes) -> vision_transformer.VisionTransformer:
    settings = {
        "img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": CLASSES, "embed_dim": 16, "depth": 3,
        "num_heads": 4, "mlp_ratio": 2.0,
    } | changes  # fmt: skip
    torch.manual_seed(seed)
    return vision_transformer.VisionTransformer(**settings)


def images(count: int = 24, seed: int = 0) -> TensorDataset:
    """Images whose class shows in their brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = torch.randn(count, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1) - 1
    return TensorDataset(pixels, labels)


class DictImages(Dataset):
    def __init__(self, count: int = 24, names: tuple[str, str] = ("image", "label")) -> None:
        self.data, self.names = images(count), names

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        return dict(zip(self.names, self.data[index], strict=True))


class EpochShuffle(torch.utils.data.Sampler):
    """An order that is a function of the epoch, as DistributedSampler has it: what an exact resume needs."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return self.length


def loader(data: Dataset | None = None, batch_size: int = 8, shuffle: bool = False) -> DataLoader:
    data = images() if data is None else data
    return DataLoader(data, batch_size=batch_size, sampler=EpochShuffle(len(data)) if shuffle else None)


class PlainClassifier(pl.LightningModule):
    """The Lightning tutorial's module."""

    def __init__(self, net: nn.Module | None = None, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = tiny_vit() if net is None else net
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class ScheduledClassifier(PlainClassifier):
    """Two schedulers, one a step and one an epoch, and dropout in the network."""

    def __init__(self, net: nn.Module | None = None, lr: float = 1e-2) -> None:
        super().__init__(
            tiny_vit(proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2) if net is None else net, lr
        )

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        per_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        per_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [
            {"scheduler": per_step, "interval": "step"},
            {"scheduler": per_epoch, "interval": "epoch"},
        ]


class DictBatches(pl.LightningModule):
    """Batches are dictionaries, the network is called with keywords, training_step returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_vit()

    def training_step(self, batch, batch_idx):
        logits = self.backbone(x=batch["image"])
        loss = F.cross_entropy(logits, batch["label"])
        self.log_dict({"train_loss": loss, "train_acc": (logits.argmax(-1) == batch["label"]).float().mean()})
        return {"loss": loss, "logits": logits.detach()}

    def validation_step(self, batch, batch_idx):
        logits = self.backbone(x=batch["image"])
        self.log("val_acc", (logits.argmax(-1) == batch["label"]).float().mean())

    def configure_optimizers(self):
        return {"optimizer": torch.optim.AdamW(self.parameters(), lr=1e-2)}


class TupleOutputs(PlainClassifier):
    """DeiT in training: the network returns the class head's and the distillation head's logits."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        from timm.models.deit import VisionTransformerDistilled

        net = VisionTransformerDistilled(
            img_size=8,
            patch_size=4,
            in_chans=1,
            num_classes=CLASSES,
            embed_dim=16,
            depth=3,
            num_heads=4,
            mlp_ratio=2.0,
        )
        net.set_distilled_training(True)
        super().__init__(net)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits, distilled = self.net(x)
        loss = (F.cross_entropy(logits, y) + F.cross_entropy(distilled, y)) / 2
        self.log("train_loss", loss)
        return loss


@dataclass
class ImageOutput:
    loss: torch.Tensor | None
    logits: torch.Tensor


class ViTWithLoss(vision_transformer.VisionTransformer):
    """A network in the Hugging Face manner: it computes its own loss."""

    def forward(self, pixel_values, labels=None):
        logits = super().forward(pixel_values)
        return ImageOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


class DataclassOutput(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = ViTWithLoss(
            img_size=8,
            patch_size=4,
            in_chans=1,
            num_classes=CLASSES,
            embed_dim=16,
            depth=3,
            num_heads=4,
            mlp_ratio=2.0,
        )

    def training_step(self, batch):
        output = self.model(**batch)
        self.log("train_loss", output.loss)
        return output.loss

    def validation_step(self, batch):
        output = self.model(**batch)
        self.log("val_loss", output.loss)
        self.log("val_acc", (output.logits.argmax(-1) == batch["labels"]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class MetricAttributes(PlainClassifier):
    """Torchmetrics as attributes, logged as objects; two validation loaders; outputs kept in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.train_acc = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.val_metrics = nn.ModuleList(
            torchmetrics.MetricCollection(
                {
                    "acc": torchmetrics.Accuracy("multiclass", num_classes=CLASSES),
                    "f1": torchmetrics.F1Score("multiclass", num_classes=CLASSES, average="macro"),
                },
                prefix=f"val{i}_",
            )
            for i in range(2)
        )
        self.best_acc = torchmetrics.MaxMetric()
        self.training_losses: list[torch.Tensor] = []
        self.seen = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True)
        self.training_losses.append(loss.detach())
        self.seen += len(y)
        return loss

    def on_train_epoch_end(self):
        self.log("epoch_loss", torch.stack(self.training_losses).mean())
        self.log("epoch_batches", float(len(self.training_losses)))
        self.training_losses.clear()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.val_metrics[dataloader_idx].update(self(x), y)

    def on_validation_epoch_end(self):
        for metrics in self.val_metrics:
            values = metrics.compute()
            self.log_dict(values)
            metrics.reset()
            if "val0_acc" in values:
                self.best_acc.update(values["val0_acc"])
        self.log("best_acc", self.best_acc.compute())


class AugmentingClassifier(PlainClassifier):
    """Random noise and mixing inside training_step, from two random generators; dropout in the network."""

    def __init__(self) -> None:
        super().__init__(tiny_vit(proj_drop_rate=0.1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * torch.randn_like(x)
        share = float(np.random.beta(0.4, 0.4))  # noqa: NPY002
        other = torch.randperm(len(x))
        mixed = share * x + (1 - share) * x[other]
        logits = self(mixed)
        loss = share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[other])
        self.log("train_loss", loss)
        return loss


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit(num_classes=0)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, CLASSES))

    def forward(self, x):
        return self.head(self.encoder.vit(x))


class NestedFeatures(PlainClassifier):
    """The network lies two levels deep, returns features, and the head is the user's."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(Nested())


class TwoNetworks(pl.LightningModule):
    """A student learns from the user's own frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = tiny_vit(0), tiny_vit(1).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.student(x)
        with torch.no_grad():
            target = self.teacher(x).softmax(-1)
        loss = F.cross_entropy(logits, y) + F.cross_entropy(logits, target)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self.student(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), 1e-2)


class ConfiguredLate(PlainClassifier):
    """The network is made in configure_model."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = tiny_vit()


class CalledTwice(PlainClassifier):
    """Two views of each image in one step, as in contrastive learning."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self(x), self(x.flip(-1))
        loss = F.cross_entropy(first, y) + (first - second).square().mean()
        self.log("train_loss", loss)
        return loss


class NormalizedHead(PlainClassifier):
    """Batch norm and dropout in the user's own head, over the features of the network."""

    def __init__(self) -> None:
        super().__init__(tiny_vit(num_classes=0))
        torch.manual_seed(1)
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(F.dropout(self.norm(self.net(x)), 0.1, self.training))


class MomentumContrast(pl.LightningModule):
    """MoCo: an encoder that follows slowly, and a queue of its outputs, both moved by training_step."""

    def __init__(self, momentum: float = 0.9, length: int = 20) -> None:
        super().__init__()
        self.query, self.key = tiny_vit(num_classes=0), tiny_vit(num_classes=0).requires_grad_(False)
        self.momentum = momentum
        self.register_buffer("queue", F.normalize(torch.randn(16, length), dim=0))
        self.register_buffer("start", torch.zeros(1, dtype=torch.long))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        query = F.normalize(self.query(x), dim=-1)
        with torch.no_grad():
            for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
                slow.mul_(self.momentum).add_(fast, alpha=1 - self.momentum)
            key = F.normalize(self.key(x.flip(-1)), dim=-1)
        positive, negative = (query * key).sum(-1, keepdim=True), query @ self.queue.clone()
        logits = torch.cat([positive, negative], 1) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
        places = (self.start + torch.arange(len(x))) % self.queue.shape[1]
        self.queue[:, places] = key.T
        self.start.copy_((self.start + len(x)) % self.queue.shape[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.query.parameters(), 1e-2)


class SkipsBatches(PlainClassifier):
    """Returns None where it does not like a batch, as guards against broken images do."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


class TalksToTheLogger(PlainClassifier):
    """Writes to its logger itself."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.logger.log_metrics({"own_loss": float(loss)}, step=self.global_step)
        return loss


class MetricCollectionInTraining(PlainClassifier):
    """A collection whose metrics share their state, logged as a dictionary of objects."""

    def __init__(self) -> None:
        super().__init__()
        self.train_metrics = torchmetrics.MetricCollection(
            {
                "acc": torchmetrics.Accuracy("multiclass", num_classes=CLASSES, average="micro"),
                "macro": torchmetrics.Accuracy("multiclass", num_classes=CLASSES, average="macro"),
                "loss": torchmetrics.MeanMetric(),
            },
            prefix="train_",
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        for name in ("acc", "macro"):
            self.train_metrics[name](logits, y)
        self.train_metrics["loss"](loss.detach())
        self.log_dict(dict(self.train_metrics), on_step=False, on_epoch=True)
        return loss


class MetricObjects(PlainClassifier):
    """Torchmetrics in both loops, logged as objects, and never reset by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracies = nn.ModuleDict(
            {
                name: torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
                for name in ("of_train", "of_val")
            }
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracies["of_train"](logits, y)
        self.log("train_acc", self.accuracies["of_train"], on_step=False, on_epoch=True)
        return F.cross_entropy(logits, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.accuracies["of_val"].update(self(x), y)
        self.log("val_acc", self.accuracies["of_val"])
