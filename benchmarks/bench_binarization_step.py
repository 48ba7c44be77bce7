"""What a training step costs under Binarization, against a plain step of the same network.

Runs take turns as in ``bench_sandwich_step``; ratios are of medians. Networks have random weights: a ViT-tiny
on 224 x 224 images and a BERT of MiniLM's size on sentences of 32 tokens.
"""

from __future__ import annotations

import pytorch_lightning as pl
import timm
import torch
from bench_sandwich_step import Classifier, step_seconds
from lightning_nas.callbacks import Binarization
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

ROUNDS, WARM_UP = 12, 2
CALLBACKS = {
    "plain": lambda: [],
    "1-bit weights": lambda: [Binarization()],
    "1-bit weights, looked at in every step": lambda: [Binarization(log_every=1)],
    "1-bit weights and activations": lambda: [Binarization(activations=1)],
    "1-bit weights, taught": lambda: [Binarization(distill_from="float")],
}
BOUNDS = {"1-bit weights": "1.25"}


class Logits(nn.Module):
    """A BERT as a function of token ids."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
        self.bert = BertForSequenceClassification(BertConfig(num_hidden_layers=6, **size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.bert(input_ids=ids).logits
        return logits


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=2)


NETWORKS = {
    "ViT-tiny, 8 images": (vit, torch.randn(8, 3, 224, 224)),
    "BERT of MiniLM's size, 32 x 32 tokens": (Logits, torch.randint(1000, 20000, (32, 32))),
}


def train(inputs: torch.Tensor, module: pl.LightningModule, callbacks: list[pl.Callback], steps: int) -> None:
    data = DataLoader(TensorDataset(inputs, torch.arange(len(inputs)) % 2), len(inputs))
    trainer = pl.Trainer(
        max_epochs=steps, callbacks=callbacks, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)


def main() -> None:
    print("| measure | ratio to a plain step | bound |\n| --- | --- | --- |")
    for network, (make, inputs) in NETWORKS.items():
        runs = {name: (Classifier(make()), callbacks()) for name, callbacks in CALLBACKS.items()}

        def turn(module, callbacks, steps, inputs=inputs):
            train(inputs, module, callbacks, steps)

        seconds = step_seconds(runs, turn, WARM_UP, ROUNDS)
        for name in [*CALLBACKS][1:]:
            ratio, bound = seconds[name] / seconds["plain"], BOUNDS.get(name, "")
            print(f"| {network}: {name} | {ratio:.3f} | {bound} |", flush=True)


if __name__ == "__main__":
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main()
