"""LightningModules for people who bring only a network's name."""

from lightning_nas.modules.glue import GLUE
from lightning_nas.modules.image_classifier import ImageClassifier, Mixing, mix, warmup_cosine
from lightning_nas.modules.sequence_classifier import (
    SequenceClassifier,
    layer_distances,
    mean_pool,
    warmup_linear,
)

__all__ = [
    "GLUE",
    "ImageClassifier",
    "Mixing",
    "SequenceClassifier",
    "layer_distances",
    "mean_pool",
    "mix",
    "warmup_cosine",
    "warmup_linear",
]
