"""A LightningModule for people who bring only the name of a timm network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from timm.data import Mixup
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_nas.modules._schedules import faults_of_optimizer, scheduled
from lightning_nas.registry import nearest

__all__ = ["ImageClassifier", "Mixing", "mix"]


@dataclass(frozen=True)
class Mixing:
    """How strongly a batch is mixed with itself, and labels are softened.

    Args:
        mixup: alpha of the Beta distribution for blending two images; 0: none (0.8 is common).
        cutmix: alpha for pasting a rectangle of another image; 0: none (1.0 is common). With both, each
            batch gets one or the other.
        label_smoothing: share of a label spread over all classes, in [0, 1).

    Raises:
        ValueError: for a value out of range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0:
            raise ValueError(f"Mixing: alphas must be at least 0, got {self.mixup=}, {self.cutmix=}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"Mixing: label_smoothing must be in [0, 1), got {self.label_smoothing}.")


def mix(images: Tensor, labels: Tensor, num_classes: int, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """A batch blended with itself in reverse order by timm's ``Mixup``; of an odd batch the last image stays.

    Args:
        images: ``(batch, channels, height, width)``; not changed.
        labels: ``(batch,)`` class indices.
        num_classes: width of the targets.
        mixing: strengths; its label smoothing is left to the loss.

    Returns:
        New images of the same shape and targets ``(batch, num_classes)`` that sum to 1.
    """
    blend = Mixup(
        mixup_alpha=mixing.mixup, cutmix_alpha=mixing.cutmix, label_smoothing=0.0, num_classes=num_classes
    )
    even = len(images) // 2 * 2
    mixed, targets = images.clone(), F.one_hot(labels, num_classes).float()
    if even:
        mixed[:even], targets[:even] = blend(mixed[:even], labels[:even])
    return mixed, targets


class ImageClassifier(pl.LightningModule):
    """Trains a classifier: layer-wise learning rates, warm-up and a schedule, mixup, accuracies.

    Batches are ``(images, labels)`` or ``{"image": images, "label": labels}``. Logged are ``train_loss``,
    ``val_loss``, ``val_acc``, ``test_loss``, ``test_acc``, and top-5 accuracies ``val_acc5``, ``test_acc5``
    where there are more than five classes. For anything else, override the method in a subclass. The network
    is :attr:`model`.

    Args:
        model: a name from ``timm.list_models()``, or a network that maps images to logits, such as one of
            :mod:`lightning_nas.models`; in YAML ``class_path: lightning_nas.models.resnet20``.
        num_classes: at least 2.
        pretrained: start from timm's weights for that name (downloads them).
        model_kwargs: further arguments of ``timm.create_model``.
        lr: peak learning rate of the last layer.
        weight_decay: of weight matrices; biases, norms and what the network exempts have none.
        layer_decay: factor of the learning rate for each layer further from the output, in (0, 1]; 1: the
            same rate everywhere.
        warmup: share of the run in which the rate rises, in [0, 1); an int: optimizer steps.
        schedule: how it falls afterwards: ``"cosine"``, ``"linear"``, or ``"constant-ending"``, exponentially
            to 5 %, which then last to the end (BigNAS, for training from scratch).
        mixing: mixup, cutmix and label smoothing; also as a dictionary.
        optimizer: ``"adamw"``, or ``"sgd"`` with a momentum of 0.9, as networks for small images are trained.

    Raises:
        ValueError: for an unknown name (the nearest is given) or a value out of range.

    Example:
        >>> tiny = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
        >>> module = ImageClassifier("vit_tiny_patch16_224", num_classes=10, model_kwargs=tiny)
        >>> module(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        model: str | nn.Module = "vit_tiny_patch16_224",
        *,
        num_classes: int,
        pretrained: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        lr: float = 5e-4,
        weight_decay: float = 0.05,
        layer_decay: float = 0.75,
        warmup: int | float = 0.1,
        schedule: Literal["cosine", "linear", "constant-ending"] = "cosine",
        mixing: Mixing | dict[str, float] | None = None,
        optimizer: Literal["adamw", "sgd"] = "adamw",
    ) -> None:
        super().__init__()
        if optimizer not in ("adamw", "sgd"):
            raise ValueError(f"ImageClassifier: optimizer must be 'adamw' or 'sgd', got {optimizer!r}.")
        _check(num_classes, lr, weight_decay, layer_decay, warmup, schedule)
        self.mixing = Mixing(**mixing) if isinstance(mixing, dict) else mixing or Mixing()
        self.model = _network(model, num_classes, pretrained, model_kwargs or {})
        self.save_hyperparameters(ignore=["model", "mixing"] if isinstance(model, nn.Module) else ["mixing"])
        self.hparams["mixing"] = asdict(
            self.mixing
        )  # plain values: a checkpoint loads without unpickling ours
        self.num_classes, self.lr, self.weight_decay = num_classes, lr, weight_decay
        self.layer_decay, self.warmup, self.schedule = layer_decay, warmup, schedule
        self.optimizer = optimizer
        accuracies = {"acc": 1, "acc5": 5} if num_classes > 5 else {"acc": 1}
        self.val_metrics, self.test_metrics = (
            nn.ModuleDict(
                {
                    name: MulticlassAccuracy(num_classes, top_k=k, average="micro")
                    for name, k in accuracies.items()
                }
            )
            for _ in range(2)
        )

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, target = _images_and_labels(batch)
        if self.mixing.mixup or self.mixing.cutmix:
            images, target = mix(images, target, self.num_classes, self.mixing)
        loss = F.cross_entropy(self(images), target, label_smoothing=self.mixing.label_smoothing)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch, self.val_metrics)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch, self.test_metrics)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The logits, ``(batch, num_classes)``; the batch may be images alone."""
        logits: Tensor = self(batch if isinstance(batch, Tensor) else _images_and_labels(batch)[0])
        return logits

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = self.parameter_groups()
        optimizer = (
            torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
            if self.optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=self.lr)
        )
        return scheduled(self, optimizer, self.schedule, self.warmup)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups of parameters that timm makes, each with its own learning rate and weight decay."""
        network: Any = self.model
        exempt = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
        if self.layer_decay == 1:
            groups = param_groups_weight_decay(self.model, self.weight_decay, no_weight_decay_list=exempt)
        else:
            groups = param_groups_layer_decay(
                self.model, self.weight_decay, no_weight_decay_list=exempt, layer_decay=self.layer_decay
            )
        return [{**group, "lr": self.lr * group.get("lr_scale", 1.0)} for group in groups]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("hyper_parameters")
        if saved is not None:  # the checkpoint has the weights: reading it must download nothing
            checkpoint["hyper_parameters"] = type(saved)({**saved, "pretrained": False})

    def _evaluate(self, stage: str, batch: Any, metrics: nn.ModuleDict) -> None:
        images, labels = _images_and_labels(batch)
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=len(images))
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            metric(logits, labels)
            self.log(f"{stage}_{name}", metric, prog_bar=name == "acc", batch_size=len(images))


def _network(
    model: str | nn.Module, num_classes: int, pretrained: bool, model_kwargs: Mapping[str, Any]
) -> nn.Module:
    if isinstance(model, str):
        if (
            not timm.is_model(model.partition(".")[0]) and "/" not in model
        ):  # hf-hub:... and local-dir:... have one
            raise ValueError(f"ImageClassifier: timm has no network {model!r}. {_near(model)}")
        network: nn.Module = timm.create_model(
            model, pretrained=pretrained, num_classes=num_classes, **model_kwargs
        )
        return network
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"ImageClassifier: model must be a timm name or a module, got {type(model).__name__}."
        )
    if pretrained or model_kwargs:
        raise ValueError(
            "ImageClassifier: pretrained and model_kwargs are for a timm name; the network you gave is "
            "complete."
        )
    classes = getattr(model, "num_classes", num_classes)
    if classes != num_classes:
        raise ValueError(f"ImageClassifier: {num_classes=}, but the network you gave has {classes} classes.")
    return model


def _near(name: str) -> str:
    """The nearest name only: timm has more than a thousand."""
    hint, _, _ = nearest(name, timm.list_models()).partition("Known: ")
    return f"{hint}timm.list_models('*vit*') lists names that contain a word."


def _check(num_classes: int, *optimizer: Any) -> None:
    faults = []
    if num_classes < 2:
        faults.append(f"num_classes must be at least 2, got {num_classes}")
    faults += faults_of_optimizer(*optimizer)
    if faults:
        raise ValueError(f"ImageClassifier: {'; '.join(faults)}.")


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping) and {"image", "label"} <= set(batch):
        return batch["image"], batch["label"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    got = f"keys {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
        f'ImageClassifier: a batch must be (images, labels) or {{"image": ..., "label": ...}}, got {got}. '
        "Change the collate function, or override the steps."
    )
