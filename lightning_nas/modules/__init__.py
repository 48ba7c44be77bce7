"""LightningModules for people who bring only a network's name."""

from lightning_nas.modules.image_classifier import ImageClassifier, Mixing, mix, warmup_cosine
from lightning_nas.modules.sequence_classifier import SequenceClassifier

__all__ = ["ImageClassifier", "Mixing", "SequenceClassifier", "mix", "warmup_cosine"]
