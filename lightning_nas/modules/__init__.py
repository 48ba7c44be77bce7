"""LightningModules for people who bring only a network's name."""

from lightning_nas.modules._schedules import exponential_constant_ending, warmup_cosine, warmup_linear
from lightning_nas.modules.glue import GLUE
from lightning_nas.modules.image_classifier import ImageClassifier, Mixing, mix
from lightning_nas.modules.relation_distillation import RelationDistillation
from lightning_nas.modules.sequence_classifier import (
    SequenceClassifier,
    layer_distances,
    mean_pool,
)

__all__ = [
    "GLUE",
    "ImageClassifier",
    "Mixing",
    "RelationDistillation",
    "SequenceClassifier",
    "exponential_constant_ending",
    "layer_distances",
    "mean_pool",
    "mix",
    "warmup_cosine",
    "warmup_linear",
]
