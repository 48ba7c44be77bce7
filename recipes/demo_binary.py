"""One callback makes a pretrained BERT binary while it is fine-tuned.

MiniLM (6 layers, 384 wide) learns the sentiment of film-review sentences, then again with weights of one bit,
and with weights and activations of one bit; at most ten minutes on two CPU cores:

    python -m lightning_nas.recipes.demo_binary

Written to --output: a table, and the three networks, the binary ones with their codes as bits.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
from lightning_nas.callbacks import Binarization
from lightning_nas.recipes.demo_bert import HELD_OUT, accuracy
from lightning_nas.recipes.demo_vit import QUIET, EpochLine, only_our_messages, say
from lightning_nas.recipes.sentiment import SentimentData, minilm_folder
from typing_extensions import override

import lightning_nas as nas
from lightning_nas.modules import SequenceClassifier


class Frozen(pl.Callback):
    """The control: the signs of the binary layers stay as they are, and all else learns."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for layer in nas.binary.layers(pl_module).values():
            layer.weight.requires_grad_(False)


def main(
    model: str | None = None,
    sentences: int = 1600,
    epochs: int = 2,
    binary_epochs: int = 3,
    lr: float = 5e-5,
    binary_lr: float = 5e-4,
    output: str = "demo_binary_output",
    seed: int = 0,
) -> None:
    """Fine-tune a BERT, make it binary in two steps, and compare.

    Args:
        model: a Hugging Face name or folder of an encoder; by default MiniLM.
        sentences: how many to train on, at most 8,000.
        epochs: of fine-tuning the float network.
        binary_epochs: of each step of binarization.
        lr: peak learning rate of the float network.
        binary_lr: of the binary ones, whose latent weights must cross zero to change.
        output: folder to write to.
        seed: of everything.
    """
    started, folder = time.perf_counter(), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with only_our_messages():
        pl.seed_everything(seed, verbose=False)
        source = minilm_folder() if model is None else model
        data = SentimentData(source, train=sentences, test=HELD_OUT, seed=seed)
        data.setup()
        rows: dict[str, dict[str, Any]] = {}

        def fit(
            name: str, module: SequenceClassifier, epochs: int, *callbacks: pl.Callback
        ) -> SequenceClassifier:
            say(f"\n{name}:")
            pl.seed_everything(seed, verbose=False)
            trainer = pl.Trainer(
                max_epochs=epochs, logger=False, gradient_clip_val=1.0, num_sanity_val_steps=0,
                callbacks=[*callbacks, EpochLine()], **QUIET,
            )  # fmt: skip
            trainer.fit(module, datamodule=data)
            rows[name] = {"accuracy": accuracy(module, data.test_dataloader())}
            if not any(isinstance(callback, Frozen) for callback in callbacks):
                saved = nas.save(module.model, folder / name.replace(" ", "-").replace(",", ""))
                rows[name]["bytes"] = (saved / "model.safetensors").stat().st_size
            return module

        module = SequenceClassifier(source, num_labels=2, pooling="mean", lr=lr)
        float_one = fit("float", module, epochs)

        def student(of: SequenceClassifier) -> SequenceClassifier:
            copied = copy.deepcopy(of)
            copied.lr = binary_lr
            return copied

        # --- a Lightning user's script, and one callback
        teacher = copy.deepcopy(float_one)  # stays as it is, frozen
        taught: dict[str, Any] = {"distill_from": teacher, "distill_hidden": "model.encoder.layer.*"}
        weights = Binarization(weights=1, **taught)
        one_bit = fit("1-bit weights", student(float_one), binary_epochs, weights)
        fit(
            "1-bit weights, frozen",
            student(float_one),
            binary_epochs,
            Binarization(weights=1, **taught),
            Frozen(),
        )
        both = Binarization(weights=1, activations=1, **taught)
        released = student(one_bit)
        nas.binary.release(released.model)  # its latent weights are where the next step begins
        fit("1-bit weights and activations", released, binary_epochs, both)

    table = pd.DataFrame(rows).T
    table["smaller"] = rows["float"]["bytes"] / table["bytes"]
    table.to_csv(folder / "networks.csv")
    say(f"\nAccuracy on {HELD_OUT:,} sentences that training has not seen:\n")
    formats = {"accuracy": "{:.1%}".format, "bytes": "{:,.0f}".format, "smaller": "{:.1f} x".format}
    say(table.to_string(formatters=formats, na_rep="-"))
    say(
        "\nfrozen: the signs stay as the float network had them and all else learns; the difference is what"
        "\n    training the signs gives. Bytes: of the saved weights; embeddings stay float."
        f"\n\nNetworks: {folder}. {time.perf_counter() - started:.0f} s in all."
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
