"""A LightningModule for people who bring only the name or folder of a Hugging Face network."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_nas.modules._schedules import faults_of_optimizer, scheduled
from lightning_nas.modules.glue import labels_and_metrics, metrics_named

__all__ = ["SequenceClassifier", "layer_distances", "mean_pool"]


def mean_pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of a sequence's tokens, without padding.

    Args:
        hidden: ``(batch, tokens, width)``.
        mask: ``(batch, tokens)``, 1 for tokens and 0 for padding; None: no padding.

    Returns:
        ``(batch, width)``; zeros where everything is padding.

    Reference: Reimers and Gurevych, Sentence-BERT, EMNLP 2019, section 3.
    """
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class SequenceClassifier(pl.LightningModule):
    """Trains a text classifier or regressor: AdamW, linear warm-up and decay, the metrics of GLUE.

    Batches are dictionaries of a tokenizer's tensors with ``labels`` (or ``label``), or text that is
    tokenised here: ``{"text": [...], "labels": ...}``, with ``"text_pair"`` for pairs, or ``(list of texts,
    labels)``. Other entries are passed over. Logged are ``train_loss``, ``val_loss``, ``test_loss`` and for
    each metric ``val_acc``, ``val_f1``, ``val_matthews``, ``val_pearson``, ``val_spearman``, and so for
    ``test``. For anything else, override the method in a subclass. The network is :attr:`model`.

    Args:
        model: a Hugging Face name (downloaded once) or folder, or a transformers network: with a head for
            sequence classification, or the base network where ``pooling="mean"``.
        num_labels: how many classes; 1: regression. None: as many as the task named in ``metrics`` has.
        metrics: names of ``accuracy``, ``f1`` (of class 1; macro for more than two), ``matthews``,
            ``pearson``, ``spearman``; or a GLUE task such as ``"mrpc"``, for its labels and metrics. None:
            accuracy, and for regression both correlations.
        pooling: how tokens become one vector. None: as the network's own head does (BERT: the first token);
            ``"mean"``: the mean over tokens, then dropout and a linear layer, which are :attr:`head`; the
            network's own pooler is dropped.
        tokenizer: for batches of text: a name, a folder or the object. None: that of ``model``.
        max_length: tokens that are kept of a text tokenised here.
        config: build the network with random weights from these values of its configuration, ``model_type``
            among them, instead of reading pretrained ones. A checkpoint has it, so reading one downloads
            nothing.
        model_kwargs: further arguments of ``from_pretrained``, such as ``attn_implementation``.
        lr: peak learning rate of the last layer.
        weight_decay: of weight matrices; biases and norms have none.
        layer_decay: factor of the learning rate for each layer further from the output, in (0, 1]; 1: the
            same rate everywhere.
        warmup: share of the run in which the rate rises, in [0, 1); an int: optimizer steps.
        schedule: how it falls afterwards: ``"linear"``, ``"cosine"``, or ``"constant-ending"``, exponentially
            to 5 %, which then last to the end.

    Raises:
        ValueError: for a value out of range, an unknown metric (the nearest is given), or metrics, labels,
            pooling and network that do not go together.

    Example:
        >>> tiny = dict(model_type="bert", hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> module = SequenceClassifier(config=tiny, num_labels=3)
        >>> module(input_ids=torch.tensor([[101, 2204, 102]])).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        model: str | Path | nn.Module = "distilbert-base-uncased",
        *,
        num_labels: int | None = None,
        metrics: str | Sequence[str] | None = None,
        pooling: Literal["mean"] | None = None,
        tokenizer: str | Path | Callable[..., Any] | None = None,
        max_length: int = 128,
        config: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        layer_decay: float = 1.0,
        warmup: int | float = 0.1,
        schedule: Literal["cosine", "linear", "constant-ending"] = "linear",
    ) -> None:
        super().__init__()
        num_labels, names = labels_and_metrics(num_labels, metrics)
        _check(num_labels, pooling, max_length, lr, weight_decay, layer_decay, warmup, schedule)
        model = str(model) if isinstance(model, Path) else model
        tokenizer = str(tokenizer) if isinstance(tokenizer, Path) else tokenizer
        self.model = _network(model, num_labels, pooling, config, model_kwargs or {}, max_length)
        self.head = _head(self.model, num_labels) if pooling == "mean" else None
        objects = {"model": model, "tokenizer": tokenizer}
        self.save_hyperparameters(ignore=[k for k, v in objects.items() if not isinstance(v, str | None)])
        self.num_labels, self.pooling, self.max_length = num_labels, pooling, max_length
        self.lr, self.weight_decay, self.layer_decay = lr, weight_decay, layer_decay
        self.warmup, self.schedule = warmup, schedule
        self._tokenizer: Any = model if tokenizer is None and isinstance(model, str) else tokenizer
        self._reads_tokenizer_early = tokenizer is not None
        self._inputs = inspect.signature(self.model.forward).parameters.keys() - {"labels"}
        self.val_metrics, self.test_metrics = (metrics_named(names, num_labels) for _ in range(2))

    @property
    def tokenizer(self) -> Any:  # its class is known to transformers alone
        """The tokenizer of text batches, read when it is first needed.

        Raises:
            ValueError: if there is none, or its vocabulary is larger than the network's embedding.
        """
        if isinstance(self._tokenizer, str):
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer)
        if self._tokenizer is None:
            raise ValueError(
                "SequenceClassifier: a batch of text needs a tokenizer, and the network was given without a "
                "name. Give tokenizer=, a name, a folder or the object."
            )
        if len(self._tokenizer) > self._vocabulary:
            raise ValueError(
                f"SequenceClassifier: the tokenizer has {len(self._tokenizer)} tokens, but the network's "
                f"embedding only {self._vocabulary}. Give the tokenizer that belongs to the network, or, if "
                "you added tokens, a network after network.resize_token_embeddings(len(tokenizer))."
            )
        return self._tokenizer

    @override
    def setup(self, stage: str) -> None:
        if self._reads_tokenizer_early:
            _ = self.tokenizer  # refused before the first step if it doesn't fit

    @override
    def forward(self, **inputs: Tensor) -> Tensor:
        """The logits ``(batch, num_labels)`` of a tokenizer's tensors."""
        output = self.model(**inputs)
        if self.head is None:
            logits: Tensor = output.logits
        else:
            logits = self.head(mean_pool(output.last_hidden_state, inputs.get("attention_mask")))
        return logits

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = self.tokenized(batch)
        if isinstance(batch, Mapping):  # on the CPU, where looking at values waits for nothing
            self._check_batch(batch)
        return batch

    def tokenized(self, batch: Any) -> Any:
        """A batch of text as a dictionary of tensors; any other batch as it is."""
        texts, pairs, labels = _text_of(batch)
        if texts is None:
            return batch
        tokens = self.tokenizer(
            texts, pairs, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {**tokens} if labels is None else {**tokens, "labels": torch.as_tensor(labels)}

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = self._inputs_and_labels(batch)
        loss = self.loss(self(**inputs), labels)
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
        """The logits, ``(batch, num_labels)``; the batch may lack labels, or be a list of texts."""
        logits: Tensor = self(**self._inputs_of(batch))
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, or for regression the squared error; the mean over the batch."""
        if self.num_labels == 1:
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.lr)
        return scheduled(self, optimizer, self.schedule, self.warmup)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters by their layer's distance from the output and by whether they decay."""
        distances = layer_distances(self.model)
        members = [(parameter, distances[name]) for name, parameter in self.model.named_parameters()]
        members += [(parameter, 0) for parameter in (self.head.parameters() if self.head is not None else ())]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter, distance in members:
            if parameter.requires_grad:
                rate = self.lr * self.layer_decay**distance
                decay = self.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, config = checkpoint.get("hyper_parameters"), self.model.config
        is_stock = getattr(config, "auto_map", None) is None  # else code of its own comes with the folder
        if saved is not None and "model" in saved and is_stock:  # reading the checkpoint downloads nothing
            plain = json.loads(config.to_json_string(use_diff=False))
            checkpoint["hyper_parameters"] = type(saved)({**saved, "config": plain})

    def _evaluate(self, stage: str, batch: Any, metrics: nn.ModuleDict) -> None:
        inputs, labels = self._inputs_and_labels(batch)
        logits = self(**inputs)
        self.log(f"{stage}_loss", self.loss(logits, labels), prog_bar=True, batch_size=len(labels))
        found = logits.float().squeeze(-1) if self.num_labels == 1 else logits.argmax(-1)
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            metric.update(found, labels.float() if self.num_labels == 1 else labels)
            self.log(f"{stage}_{name}", metric, prog_bar=True, batch_size=len(labels))

    def _inputs_of(self, batch: Any) -> dict[str, Tensor]:
        batch = self.tokenized(batch)
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise ValueError(
                f"SequenceClassifier: {_FORMS}, got {_described(batch)}. Change the collate "
                "function, or override the steps."
            )
        return {name: tensor.to(self.device) for name, tensor in batch.items() if name in self._inputs}

    def _inputs_and_labels(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        batch = self.tokenized(batch)
        inputs, labels = self._inputs_of(batch), _labels_of(batch)
        if labels is None:
            raise ValueError(
                f"SequenceClassifier: the batch has no labels; {_FORMS}, got {_described(batch)}."
            )
        return inputs, labels.to(self.device)

    @property
    def _vocabulary(self) -> int:
        rows: int = self.model.get_input_embeddings().weight.shape[0]
        return rows

    def _check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse values that would index out of range, which a GPU reports late and without their names."""
        ids, labels = batch.get("input_ids"), _labels_of(batch)
        if isinstance(ids, Tensor) and ids.numel() and ids.max() >= self._vocabulary:
            raise ValueError(
                f"SequenceClassifier: a batch has token {int(ids.max())}, but the network's embedding has "
                f"{self._vocabulary} rows. The data was made with the tokenizer of another network."
            )
        if labels is None or self.trainer.predicting:
            return
        if labels.ndim != 1:
            raise ValueError(f"SequenceClassifier: labels must be (batch,), got {tuple(labels.shape)}.")
        if self.num_labels > 1 and labels.is_floating_point():
            raise ValueError(
                f"SequenceClassifier: labels of {self.num_labels} classes must be whole numbers, got "
                f"{labels.dtype}. Use num_labels=1 for regression."
            )
        if self.num_labels > 1 and not ((labels >= 0) & (labels < self.num_labels)).all():
            raise ValueError(
                f"SequenceClassifier: labels must be 0 to {self.num_labels - 1} with num_labels="
                f"{self.num_labels}, got {sorted(set(labels.tolist()))}."
            )


def layer_distances(network: nn.Module) -> dict[str, int]:
    """How far each parameter is from the output: 0 behind the layers, 1 in the last, and so on.

    The layers are the longest ``nn.ModuleList``; what comes before them is one further than the first.
    """
    lists = {name: m for name, m in network.named_modules() if isinstance(m, nn.ModuleList)}
    layers = max(lists, key=lambda name: len(lists[name]))
    number, distances, outside = len(lists[layers]), {}, len(lists[layers]) + 1
    for name, _ in network.named_parameters():
        if name.startswith(f"{layers}."):
            distances[name] = number - int(name.removeprefix(f"{layers}.").partition(".")[0])
            outside = 0  # modules come in the order they run
        else:
            distances[name] = outside
    return distances


def _network(
    model: str | nn.Module,
    num_labels: int,
    pooling: str | None,
    config: Mapping[str, Any] | None,
    model_kwargs: Mapping[str, Any],
    max_length: int,
) -> Any:  # a PreTrainedModel, whose class only transformers knows
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

    auto = AutoModel if pooling else AutoModelForSequenceClassification
    options: dict[str, Any] = {} if pooling else {"num_labels": num_labels}
    if not isinstance(model, str):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                "SequenceClassifier: model must be a Hugging Face name, a folder or a transformers network, "
                f"got {type(model).__name__}."
            )
        if config is not None or model_kwargs:
            raise ValueError(
                "SequenceClassifier: config and model_kwargs are for a name; the network you gave is whole."
            )
        network: Any = model
        _check_head(network, num_labels, pooling)
    elif config is None:
        # Lightning's precision decides the type in use; weights stored in half precision would train in it.
        network = auto.from_pretrained(model, **{"dtype": torch.float32, **options, **model_kwargs})
        network.train()  # it comes in eval mode, which Lightning would keep: no dropout
    elif "model_type" not in config:
        raise ValueError(
            f'SequenceClassifier: config needs a "model_type" such as "bert", got {sorted(config)}.'
        )
    else:
        network = auto.from_config(AutoConfig.for_model(**{**config, **options}), **model_kwargs)
    if pooling and getattr(network, "pooler", None) is not None:
        network.pooler = None  # its parameters would have no gradient
    limit = getattr(network.config, "max_position_embeddings", None)
    if limit is not None and 0 < limit < max_length:
        raise ValueError(f"SequenceClassifier: {max_length=}, but the network has {limit} positions.")
    return network


def _check_head(network: Any, num_labels: int, pooling: str | None) -> None:
    is_base = network.base_model is network
    if pooling and not is_base:
        raise ValueError(
            f"SequenceClassifier: {pooling=} brings its own head, but {type(network).__name__} has one. Give "
            "network.base_model."
        )
    if not pooling and is_base:
        raise ValueError(
            f"SequenceClassifier: {type(network).__name__} has no head. Use pooling='mean', which adds one, "
            "or AutoModelForSequenceClassification."
        )
    if not pooling and network.config.num_labels != num_labels:
        raise ValueError(
            f"SequenceClassifier: {num_labels=}, but the network you gave has {network.config.num_labels}."
        )


def _head(network: Any, num_labels: int) -> nn.Sequential:
    rates = (getattr(network.config, name, None) for name in ("classifier_dropout", "hidden_dropout_prob"))
    dropout = next((rate for rate in rates if rate is not None), 0.1)
    with torch.no_grad(), torch.random.fork_rng([]):  # a narrower network's config may not say its width
        token = torch.zeros(1, 1, dtype=torch.long, device=network.device)
        width = network(input_ids=token).last_hidden_state.shape[-1]
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(width, num_labels))


def _check(num_labels: int, pooling: str | None, max_length: int, *optimizer: Any) -> None:
    faults = []
    if num_labels < 1:
        faults.append(f"num_labels must be at least 1, got {num_labels}")
    if pooling not in (None, "mean"):
        faults.append(f"pooling must be None or 'mean', got {pooling!r}")
    if max_length < 1:
        faults.append(f"max_length must be at least 1, got {max_length}")
    faults += faults_of_optimizer(*optimizer)
    if faults:
        raise ValueError(f"SequenceClassifier: {'; '.join(faults)}.")


_FORMS = (
    'a batch must be a dictionary of a tokenizer\'s tensors with "labels", {"text": [...], "labels": ...} or '
    "(list of texts, labels)"
)


def _text_of(batch: Any) -> tuple[list[str] | None, list[str] | None, Any]:
    """Texts, their pairs, labels, as far as the batch has them; no texts: it isn't a batch of text."""
    if isinstance(batch, Mapping) and "text" in batch and "input_ids" not in batch:
        pairs = batch.get("text_pair")
        return list(batch["text"]), None if pairs is None else list(pairs), _labels_of(batch)
    if _are_texts(batch):
        return list(batch), None, None
    if isinstance(batch, tuple | list) and len(batch) == 2 and _are_texts(batch[0]):
        return list(batch[0]), None, batch[1]
    return None, None, None


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _labels_of(batch: Mapping[str, Any]) -> Any:
    return batch.get("labels", batch.get("label"))


def _described(batch: Any) -> str:
    return f"keys {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
