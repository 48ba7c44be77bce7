"""What a step on MiniLM costs, 32 sentences of 32 tokens: the sandwich, and several members in one pass.

Runs take turns as in ``bench_sandwich_step``; ratios are of medians.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from bench_sandwich_step import Fixed, middle, step_seconds
from lightning_nas.callbacks import SupernetTraining
from lightning_nas.recipes.sentiment import minilm_folder
from torch.utils.data import DataLoader, TensorDataset

import lightning_nas as nas
from lightning_nas.modules import SequenceClassifier

ROUNDS, WARM_UP, BATCH, TOKENS = 12, 3, 32, 32


def classifier() -> SequenceClassifier:
    return SequenceClassifier(minilm_folder(), num_labels=2, pooling="mean", max_length=TOKENS)


def train(module: pl.LightningModule, callbacks: list[pl.Callback], steps: int) -> None:
    ids = torch.randint(1000, 20000, (BATCH, TOKENS))
    data = TensorDataset(ids, torch.ones_like(ids), torch.randint(0, 2, (BATCH,)))
    names = ("input_ids", "attention_mask", "labels")

    def collate(rows: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        return {n: torch.stack(column) for n, column in zip(names, zip(*rows, strict=True), strict=True)}

    trainer = pl.Trainer(
        max_epochs=steps, callbacks=callbacks, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, BATCH, collate_fn=collate))


def runs() -> dict[str, tuple[pl.LightningModule, list[pl.Callback]]]:
    """Modules and callbacks by name of the run; the students are those of the sandwich."""
    source = classifier()
    supernet = nas.Supernet(source.model)
    members = (middle(supernet.space), supernet.space.smallest)
    cut = []
    for member in members:
        module = classifier()
        module.model = supernet.extract(member)
        cut.append(module)
    at_once = {"warmup": 0, "order": None, "validate": ()}
    teacher = {"students_learn_from": "teacher"}
    return {
        "largest": (classifier(), []),
        "middle": (cut[0], []),
        "smallest": (cut[1], []),
        "sandwich": (classifier(), [SupernetTraining(sampler=Fixed(members), **at_once, **teacher)]),
        "mixture": (classifier(), [SupernetTraining(sampler=nas.MultiArchitectural(parts=4), **at_once)]),
    }


def main() -> None:
    seconds = step_seconds(runs(), train, WARM_UP, ROUNDS)
    alone = seconds["largest"] + seconds["middle"] + seconds["smallest"]
    sandwich, mixture = seconds["sandwich"] / alone, seconds["mixture"] / seconds["largest"]
    print("| measure | ratio | bound |\n| --- | --- | --- |")
    print(f"| MiniLM: sandwich step / sum of standalone steps | {sandwich:.3f} | 1.08 |")
    print(f"| MiniLM: four members in one pass / plain step | {mixture:.3f} | 1.15 |")


if __name__ == "__main__":
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main()
