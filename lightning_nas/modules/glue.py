"""The tasks of GLUE, and metrics of classification and regression by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from lightning_nas.registry import nearest

__all__ = ["GLUE", "labels_and_metrics", "metrics_named"]

GLUE: dict[str, tuple[int, tuple[str, ...]]] = {
    "cola": (2, ("matthews",)),
    "sst2": (2, ("accuracy",)),
    "mrpc": (2, ("accuracy", "f1")),
    "qqp": (2, ("accuracy", "f1")),
    "stsb": (1, ("pearson", "spearman")),
    "mnli": (3, ("accuracy",)),
    "qnli": (2, ("accuracy",)),
    "rte": (2, ("accuracy",)),
    "wnli": (2, ("accuracy",)),
}
"""Labels and metrics of each task; one label is regression.

Reference: Wang et al., GLUE, ICLR 2019, table 1.
"""

_CLASSIFICATION: dict[str, Callable[[int], Metric]] = {  # made from the number of labels
    "accuracy": partial(MulticlassAccuracy, average="micro"),
    "f1": lambda labels: BinaryF1Score() if labels == 2 else MulticlassF1Score(labels, average="macro"),
    "matthews": MulticlassMatthewsCorrCoef,
}
_REGRESSION: dict[str, Callable[[int], Metric]] = {"pearson": PearsonCorrCoef, "spearman": SpearmanCorrCoef}


def labels_and_metrics(
    num_labels: int | None, metrics: str | Sequence[str] | None
) -> tuple[int, tuple[str, ...]]:
    """The number of labels and the names of metrics that a user's two arguments mean together.

    Args:
        num_labels: 1 for regression; None: as many as the task has.
        metrics: a task of :data:`GLUE`, a metric, several metrics, or None: accuracy, and for regression both
            correlations.

    Raises:
        ValueError: for an unknown name (the nearest is given), and for labels and metrics that do not go
            together.
    """
    if isinstance(metrics, str) and metrics in GLUE:
        labels, names = GLUE[metrics]
        if num_labels not in (None, labels):
            raise ValueError(f"SequenceClassifier: {num_labels=}, but the task {metrics!r} has {labels}.")
        return labels, names
    if num_labels is None:
        raise ValueError(
            "SequenceClassifier: give num_labels (1: regression), or as metrics a task of GLUE: "
            f"{', '.join(GLUE)}."
        )
    fitting = _REGRESSION if num_labels == 1 else _CLASSIFICATION
    if metrics is None:
        return num_labels, tuple(_REGRESSION) if num_labels == 1 else ("accuracy",)
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for name in names:
        if name in fitting:
            continue
        if name in _REGRESSION or name in _CLASSIFICATION:
            raise ValueError(
                f"SequenceClassifier: the metric {name!r} does not fit {num_labels=}; these do: "
                f"{', '.join(fitting)}."
            )
        raise ValueError(f"SequenceClassifier: unknown metric {name!r}. {nearest(name, [*fitting, *GLUE])}")
    return num_labels, names


def metrics_named(names: Sequence[str], num_labels: int) -> nn.ModuleDict:
    """Metrics by the name they are logged under: that of the metric, ``acc`` for accuracy."""
    makers = _REGRESSION if num_labels == 1 else _CLASSIFICATION
    return nn.ModuleDict({"acc" if name == "accuracy" else name: makers[name](num_labels) for name in names})
