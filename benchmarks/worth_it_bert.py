"""Is the family worth its run, on a real pretrained BERT? MiniLM and the sentiment of film-review sentences.

For each seed, the accuracy of the full network, and of subnetworks of three sizes:

- plain fine-tuning for two epochs, then slices, in stored order and in the order of importance;
- one run of two epochs with ``SupernetTraining``: a plain epoch, ordering, a sandwich epoch;
- that shape alone: cut from the ordered network after the plain epoch, trained alone for the second epoch;
- the subnetwork of the family after ``specialize`` for a quarter of an epoch.

Run: python benchmarks/worth_it_bert.py --seeds '[0,1,2]' --page docs/worth-it-bert.md
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SupernetTraining, specialize
from lightning_nas.recipes import demo_vit
from lightning_nas.recipes.sentiment import SentimentData, minilm_folder
from torch import nn
from worth_it import markdown, publish, uniform

import lightning_nas as nas
from lightning_nas.modules import SequenceClassifier

SHAPES = {  # size: blocks, heads of 12 and MLP units of 1536 in each block
    "75 %": (6, 9, 1152),
    "50 %": (5, 9, 768),
    "30 %": (4, 6, 768),
}
PLAIN_RATE, SANDWICH_RATE = 5e-5, 1.5e-4
FAMILY, SPECIAL, ALONE = "subnetwork of the family", "the same, specialized", "that shape, alone"
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
}


class Study:
    """The arms of one seed: all start from the same head and see the same split.

    Args:
        seed: of the split, the head, dropout and the order of batches.
        sentences: how many to train on.
    """

    def __init__(self, seed: int, sentences: int) -> None:
        self.seed = seed
        pl.seed_everything(seed, verbose=False)
        self.start = SequenceClassifier(minilm_folder(), num_labels=2, pooling="mean", lr=PLAIN_RATE)
        self.data = SentimentData(train=sentences, seed=seed)
        self.data.setup()
        self.seconds: dict[str, float] = {}

    def fit(self, arm: str, module: SequenceClassifier, *callbacks: pl.Callback, epochs: int = 1) -> None:
        """Train, and note the processor's time."""
        pl.seed_everything(self.seed, verbose=False)
        began = time.process_time()
        trainer = pl.Trainer(max_epochs=epochs, limit_val_batches=0, callbacks=list(callbacks), **QUIET)
        trainer.fit(module, datamodule=self.data)
        self.seconds[arm] = self.seconds.get(arm, 0.0) + time.process_time() - began

    def accuracy(self, module: SequenceClassifier) -> float:
        """On the held-out sentences, in percent."""
        (values,) = pl.Trainer(**QUIET).validate(module, self.data.val_dataloader(), verbose=False)
        return 100 * values["val_acc"]

    def family(self, module: SequenceClassifier, supernet: nas.Supernet) -> dict[str, float]:
        """The full network and each shape."""
        found = {"100 %": self.accuracy(module)}
        for size, shape in SHAPES.items():
            with supernet.using(uniform(supernet.space, *shape)):
                found[size] = self.accuracy(module)
        return found

    def ordered(self, module: SequenceClassifier) -> nas.Supernet:
        """The module's network in the order of importance on eight batches."""
        batches = [batch for batch, _ in zip(self.data.train_dataloader(), range(8), strict=False)]
        # The network has no head, so its output is no loss: gradients come from the module.
        supernet = nas.Supernet(module.model)
        module.eval()
        for batch in batches:
            loss = nn.functional.cross_entropy(module(**{k: batch[k] for k in TOKENS}), batch["labels"])
            loss.backward()
        supernet.reorder(supernet.importance())
        module.zero_grad()
        return supernet

    def plain(self) -> dict[str, dict[str, float]]:
        """Two plain epochs, and slices of what they give."""
        module = copy.deepcopy(self.start)
        self.fit("plain fine-tuning, sliced", module, epochs=2)
        supernet = nas.Supernet(module.model)
        sliced = self.family(module, supernet)
        supernet.release()
        return {
            "plain fine-tuning, sliced": sliced,
            "plain fine-tuning, ordered, sliced": self.family(module, self.ordered(module)),
        }

    def subnetworks(self, **settings: Any) -> dict[str, dict[str, float]]:
        """One run with the callback, and its subnetworks specialized."""
        module = copy.deepcopy(self.start)
        callback = SupernetTraining(
            warmup=0.5,
            lr_factor=2 * SANDWICH_RATE / PLAIN_RATE,
            head="head",
            sampler=nas.Sandwich(random=2),
            validate=(),
            seed=self.seed,
            **settings,
        )
        self.fit(FAMILY, module, callback, epochs=2)
        assert callback.supernet is not None
        found = {FAMILY: self.family(module, callback.supernet), SPECIAL: {}}
        module.lr = PLAIN_RATE
        for size, shape in SHAPES.items():
            began = time.process_time()
            pl.seed_everything(self.seed, verbose=False)
            member = uniform(callback.supernet.space, *shape)
            trainer = pl.Trainer(limit_val_batches=0, **QUIET)
            network = specialize(member, trainer, module, self.data, supernet=callback.supernet, head="head")
            self.seconds[SPECIAL] = self.seconds.get(SPECIAL, 0.0) + time.process_time() - began
            small = trainer.lightning_module
            assert small.model is network
            found[SPECIAL][size] = self.accuracy(small)
        return found

    def alone(self) -> dict[str, dict[str, float]]:
        """A plain epoch, then a run for each shape, cut from the ordered network."""
        module = copy.deepcopy(self.start)
        self.fit(ALONE, module)
        supernet = self.ordered(module)
        found = {}
        for size, shape in SHAPES.items():
            network = supernet.extract(uniform(supernet.space, *shape))
            supernet.release()
            cut = copy.deepcopy(module)
            cut.model, cut.lr = network, SANDWICH_RATE
            supernet = nas.Supernet(module.model)
            self.fit(ALONE, cut)
            found[size] = self.accuracy(cut)
        return {ALONE: found}


TOKENS = ("input_ids", "attention_mask")


def run(seeds: Sequence[int], sentences: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All arms for all seeds.

    Returns:
        Accuracies in percent, by arm and seed, a column a size; and processor seconds, by arm and seed.
    """
    rows, seconds = {}, {}
    for seed in seeds:
        study = Study(seed, sentences)
        for measure in (study.subnetworks, study.plain, study.alone):
            for arm, found in measure().items():
                rows[arm, seed] = found
                shown = "  ".join(f"{size} {value:5.2f}" for size, value in found.items())
                print(f"seed {seed}  {arm:<36} {shown}  {study.seconds.get(arm, 0):.0f} s", flush=True)
        seconds[seed] = study.seconds
    table = pd.DataFrame.from_dict(rows, orient="index")[["100 %", *SHAPES]]
    table.index.names = ["arm", "seed"]
    return table, pd.DataFrame(seconds)


def main(seeds: list[int] = [0, 1, 2], sentences: int = 8000, page: str | None = None) -> None:  # noqa: B006
    """Measure, print the table, and write it into a page between its two marks."""
    torch.set_num_threads(1)
    with demo_vit.only_our_messages():
        publish(markdown(*run(seeds, sentences), FAMILY), page)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
