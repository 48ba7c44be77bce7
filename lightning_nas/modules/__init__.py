"""LightningModules for people who bring only a network's name."""

from lightning_nas.modules.image_classifier import ImageClassifier, Mixing, mix, warmup_cosine

__all__ = ["ImageClassifier", "Mixing", "mix", "warmup_cosine"]
