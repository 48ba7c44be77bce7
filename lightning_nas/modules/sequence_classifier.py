"""A LightningModule for people who bring only the name of a Hugging Face model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef
from typing_extensions import override

from lightning_nas.registry import nearest

__all__ = ["SequenceClassifier"]

METRICS: dict[str, Callable[[int], Metric]] = {
    "acc": lambda labels: MulticlassAccuracy(labels, average="micro"),
    "f1": lambda labels: BinaryF1Score() if labels == 2 else MulticlassF1Score(labels, average="macro"),
    "matthews": lambda labels: MulticlassMatthewsCorrCoef(labels),
    "pearson": lambda labels: PearsonCorrCoef(),
    "spearman": lambda labels: SpearmanCorrCoef(),
    "mse": lambda labels: MeanSquaredError(),
}
REGRESSION = ("pearson", "spearman", "mse")
GLUE = {  # task: labels, metrics
    "cola": (2, ("matthews",)),
    "sst2": (2, ("acc",)),
    "mrpc": (2, ("acc", "f1")),
    "qqp": (2, ("acc", "f1")),
    "stsb": (1, ("pearson", "spearman")),
    "mnli": (3, ("acc",)),
    "qnli": (2, ("acc",)),
    "rte": (2, ("acc",)),
    "wnli": (2, ("acc",)),
}


class SequenceClassifier(pl.LightningModule):
    """Fine-tunes a text model to classify sequences, or pairs of them, or to rate them.

    Batches are what a tokenizer gives, with ``labels`` (``{"input_ids": ..., "attention_mask": ...,
    "labels": ...}``), or text: ``{"text": [...], "labels": ...}``, with ``"text_pair"`` for pairs, or
    ``([...], labels)``. Logged are ``train_loss``, ``val_loss``, ``test_loss``, and each metric as
    ``val_acc``, ``test_acc``. AdamW, linear warm-up and decay. The network is :attr:`model`.

    Args:
        model: a Hugging Face name, a folder, or a transformers model: with a head for sequences, or without
            one if ``pooling="mean"``.
        task: a GLUE task, which sets ``num_labels`` and ``metrics``: ``"sst2"``, ``"mrpc"``, ``"stsb"``, ...
        num_labels: at least 2, or 1 for regression.
        metrics: of ``"acc"``, ``"f1"`` (of class 1, or the mean over more than two), ``"matthews"``; for
            regression ``"pearson"``, ``"spearman"``, ``"mse"``. None: ``"acc"``, or the first two of these.
        tokenizer: a tokenizer, its name or folder; None: that of ``model``.
        pooling: ``"mean"``: average the tokens' features, behind a linear head of this module's own, as
            sentence encoders are trained; None: the model's own head.
        max_length: tokens to which text is cut.
        lr: peak learning rate.
        weight_decay: of weight matrices; biases and norms have none.
        warmup: share of the run in which the rate rises, in [0, 1); an int: optimizer steps.
        dropout: before the linear head of ``pooling="mean"``.

    Raises:
        ValueError: for an unknown task or metric, a value out of range, a tokenizer that has more tokens than
            the model; and, with the first batch, for a label beyond ``num_labels``.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        task: str | None = None,
        num_labels: int = 2,
        metrics: Sequence[str] | str | None = None,
        tokenizer: Any = None,  # a name, or any of transformers' tokenizers
        pooling: Literal["mean"] | None = None,
        max_length: int = 128,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        warmup: int | float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if task is not None:
            if task not in GLUE:
                raise ValueError(f"SequenceClassifier: unknown task {task!r}. {nearest(task, GLUE)}")
            num_labels, metrics = GLUE[task][0], metrics or GLUE[task][1]
        names = _metric_names(metrics, num_labels)
        _check(num_labels, lr, weight_decay, warmup, max_length, dropout, pooling)
        self.num_labels, self.lr, self.weight_decay = num_labels, lr, weight_decay
        self.warmup, self.max_length, self.pooling = warmup, max_length, pooling
        self.model = _network(model, num_labels, pooling)
        self.save_hyperparameters(ignore=_not_plain(model=model, tokenizer=tokenizer))
        if pooling == "mean":
            width = self.model.config.hidden_size  # type: ignore[union-attr]
            self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, num_labels)
        self._tokenizer = tokenizer if tokenizer is not None else (model if isinstance(model, str) else None)
        if tokenizer is not None and not isinstance(tokenizer, str):
            self._fits(tokenizer)
        self.val_metrics, self.test_metrics = (
            nn.ModuleDict({name: METRICS[name](num_labels) for name in names}) for _ in range(2)
        )
        self._has_seen_labels = False

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when first needed.

        Raises:
            ValueError: if there is none, or it has more tokens than the model.
        """
        if self._tokenizer is None:
            raise ValueError(
                "SequenceClassifier: a batch of text needs a tokenizer; give tokenizer=, or batches of ids."
            )
        if isinstance(self._tokenizer, str):
            from transformers import AutoTokenizer

            self._tokenizer = self._fits(AutoTokenizer.from_pretrained(self._tokenizer))
        return self._tokenizer

    @override
    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits ``(batch, num_labels)`` for what the tokenizer gives."""
        output = self.model(**inputs)
        if self.pooling is None:
            logits: Tensor = output.logits
            return logits
        features = output.last_hidden_state  # (batch, tokens, width)
        mask = inputs.get("attention_mask")
        weight = torch.ones_like(features[..., :1]) if mask is None else mask.unsqueeze(-1).to(features.dtype)
        pooled = (features * weight).sum(1) / weight.sum(1).clamp(min=1)
        scores: Tensor = self.head(self.dropout(pooled))
        return scores

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = self._inputs_and_labels(batch)
        loss = self._loss(self(**inputs), labels)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch, self.val_metrics)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch, self.test_metrics)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The logits, ``(batch, num_labels)``; the batch needs no labels, and may be a list of strings."""
        if isinstance(batch, list) and all(isinstance(text, str) for text in batch):
            batch = {"text": batch}
        logits: Tensor = self(**self._inputs_and_labels(batch, needs_labels=False)[0])
        return logits

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError(
                "SequenceClassifier: the linear schedule needs the length of the run, which is unknown here. "
                "Give the Trainer max_epochs or max_steps, or override configure_optimizers."
            )
        from transformers import get_linear_schedule_with_warmup

        warmup = self.warmup if isinstance(self.warmup, int) else round(self.warmup * total)
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, stage: str, batch: Any, metrics: nn.ModuleDict) -> None:
        inputs, labels = self._inputs_and_labels(batch)
        logits = self(**inputs)
        self.log(f"{stage}_loss", self._loss(logits, labels), prog_bar=True, batch_size=len(labels))
        predicted = logits.squeeze(-1) if self.num_labels == 1 else logits.argmax(-1)
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            metric.update(predicted.float() if self.num_labels == 1 else predicted, labels)
            self.log(f"{stage}_{name}", metric, prog_bar=name == "acc", batch_size=len(labels))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.num_labels == 1:
            return F.mse_loss(logits.squeeze(-1).float(), labels.float())
        if not self._has_seen_labels:  # once: looking at values makes a GPU wait
            self._has_seen_labels = True
            lowest, highest = int(labels.min()), int(labels.max())
            if lowest < 0 or highest >= self.num_labels:
                raise ValueError(
                    f"SequenceClassifier: labels run from {lowest} to {highest}, but num_labels="
                    f"{self.num_labels} allows 0 to {self.num_labels - 1}."
                )
        return F.cross_entropy(logits, labels)

    def _inputs_and_labels(self, batch: Any, needs_labels: bool = True) -> tuple[dict[str, Tensor], Any]:
        if isinstance(batch, tuple | list) and len(batch) == 2:
            batch = {"text": list(batch[0]), "labels": batch[1]}
        if not isinstance(batch, Mapping) or not {"input_ids", "text"} & set(batch):
            got = f"keys {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                'SequenceClassifier: a batch must be what a tokenizer gives, with "labels", or '
                f'{{"text": [...], "labels": ...}}, or ([...], labels); got {got}. Change the collate '
                "function."
            )
        inputs = dict(batch)
        labels = inputs.pop("labels", inputs.pop("label", None))
        if labels is None and needs_labels:
            raise ValueError(f'SequenceClassifier: a batch must have "labels", got keys {sorted(batch)}.')
        if "text" in inputs:
            texts = [list(inputs[name]) for name in ("text", "text_pair") if name in inputs]
            inputs = self.tokenizer(
                *texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        if labels is not None and not isinstance(labels, Tensor):
            labels = torch.tensor(labels, device=self.device)
        return inputs, labels

    def _fits(self, tokenizer: Any) -> Any:
        rows = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if len(tokenizer) > rows:
            raise ValueError(
                f"SequenceClassifier: the tokenizer has {len(tokenizer)} tokens, the model's embedding only "
                f"{rows}. Give the model's own tokenizer, or call model.resize_token_embeddings first."
            )
        return tokenizer


def _network(model: str | nn.Module, num_labels: int, pooling: str | None) -> nn.Module:
    if isinstance(model, nn.Module):
        own = getattr(getattr(model, "config", None), "num_labels", num_labels)
        if pooling is None and own != num_labels:
            raise ValueError(
                f"SequenceClassifier: num_labels={num_labels}, but the model you gave has {own} labels."
            )
        return model
    from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForSequenceClassification

    if pooling is None:
        found: nn.Module = AutoModelForSequenceClassification.from_pretrained(model, num_labels=num_labels)
        return found
    config = AutoConfig.from_pretrained(model)
    takes = inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
    without_pooler = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
    base: nn.Module = AutoModel.from_pretrained(model, **without_pooler)
    return base


def _not_plain(**values: Any) -> list[str]:
    return [name for name, value in values.items() if not isinstance(value, str | None)]


def _metric_names(metrics: Sequence[str] | str | None, num_labels: int) -> tuple[str, ...]:
    if metrics is None:
        return ("acc",) if num_labels > 1 else REGRESSION[:2]
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for name in names:
        if name not in METRICS:
            raise ValueError(f"SequenceClassifier: unknown metric {name!r}. {nearest(name, METRICS)}")
        if (name in REGRESSION) != (num_labels == 1):
            raise ValueError(
                f"SequenceClassifier: the metric {name!r} is for "
                f"{'regression, num_labels=1' if name in REGRESSION else 'classes, num_labels above 1'}, got "
                f"num_labels={num_labels}."
            )
    return names


def _check(
    num_labels: int,
    lr: float,
    weight_decay: float,
    warmup: int | float,
    max_length: int,
    dropout: float,
    pooling: str | None,
) -> None:
    faults = []
    if num_labels < 1:
        faults.append(f"num_labels must be at least 1, got {num_labels}")
    if lr <= 0:
        faults.append(f"lr must be above 0, got {lr}")
    if weight_decay < 0:
        faults.append(f"weight_decay must be at least 0, got {weight_decay}")
    if warmup < 0 or (isinstance(warmup, float) and warmup >= 1):
        faults.append(f"warmup must be a share in [0, 1) or a number of steps as an int, got {warmup!r}")
    if max_length < 1:
        faults.append(f"max_length must be at least 1, got {max_length}")
    if not 0 <= dropout < 1:
        faults.append(f"dropout must be in [0, 1), got {dropout}")
    if pooling not in (None, "mean"):
        faults.append(f"pooling must be 'mean' or None, got {pooling!r}")
    if faults:
        raise ValueError(f"SequenceClassifier: {'; '.join(faults)}.")
