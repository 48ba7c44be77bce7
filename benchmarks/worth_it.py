"""Is the family worth its run? Subnetworks against slices, shallower networks and standalone training.

On the demo's network and images, for each seed and each of three sizes, the accuracy of

- the plainly fine-tuned network, sliced in its stored order and in the order of importance;
- the pretrained network's first blocks, as many as reach that cost, trained alone for as many steps;
- the pretrained network cut to the subnetwork's very shape, trained alone for as many steps;
- the subnetwork of one run with ``SupernetTraining``.

Run: python benchmarks/worth_it.py --page docs/worth-it.md
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SupernetTraining
from lightning_nas.recipes import demo_vit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_nas as nas
from lightning_nas.modules import ImageClassifier

SHAPES = {  # size: blocks, heads and MLP units of each block
    "75 %": (6, 3, 192),
    "50 %": (5, 3, 128),
    "30 %": (4, 3, 64),
}
SETTINGS: dict[str, Any] = {"warmup": 0.15, "sampler": nas.Sandwich(random=2)}  # of the callback
CALLBACK = "subnetwork of the family"


class Study:
    """The arms of one seed: all start from the same pretrained weights and see the same images.

    Args:
        seed: of the split, the pretrained network, and the order of batches.
        images: number of images to train on; the rest of the 5,000 measures.
        epochs: of pretraining and of each arm.
    """

    def __init__(self, seed: int, images: int = 2000, epochs: int = 8) -> None:
        self.seed, self.epochs = seed, epochs
        pixels, labels = demo_vit.handwritten_digits().tensors
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        self.train, self.test = (
            TensorDataset(pixels[part], labels[part]) for part in (order[:images], order[images:])
        )
        pl.seed_everything(seed, verbose=False)
        self.start: Any = demo_vit.pretrained_vit(epochs)
        self.start.reset_classifier(10)
        self.seconds: dict[str, float] = {}

    def fit(self, arm: str, network: nn.Module, *callbacks: pl.Callback) -> nn.Module:
        """Train a network for the same steps as all others."""
        pl.seed_everything(self.seed, verbose=False)
        module = ImageClassifier(network, num_classes=10, lr=2e-3, layer_decay=1.0)
        trainer = pl.Trainer(
            max_epochs=self.epochs, callbacks=list(callbacks), logger=False, **demo_vit.QUIET
        )
        began = time.process_time()
        trainer.fit(module, DataLoader(self.train, 32, shuffle=True))
        self.seconds[arm] = self.seconds.get(arm, 0.0) + time.process_time() - began
        return network

    def accuracy(self, network: nn.Module) -> float:
        """In percent."""
        return 100 * demo_vit.accuracy(network, self.test)

    def family(self, supernet: nas.Supernet) -> dict[str, float]:
        """Accuracy of the full network and of each shape."""
        found = {"100 %": self.accuracy(supernet.model)}
        for size, shape in SHAPES.items():
            with supernet.using(uniform(supernet.space, *shape)):
                found[size] = self.accuracy(supernet.model)
        return found

    def sliced(self) -> dict[str, float]:
        """The plainly fine-tuned network and its slices."""
        self.plain = self.fit("plain fine-tuning, sliced", copy.deepcopy(self.start))
        return self.family(nas.Supernet(copy.deepcopy(self.plain)))

    def ordered(self) -> dict[str, float]:
        """The same, in the order of importance."""
        supernet = nas.Supernet(
            copy.deepcopy(self.plain), order="importance", calibration=list(DataLoader(self.train, 64)),
            loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch[1]),
        )  # fmt: skip
        return self.family(supernet)

    def subnetworks(self, **settings: Any) -> dict[str, float]:
        """One run with the callback."""
        callback = SupernetTraining(validate=(), seed=self.seed, **settings)
        self.fit(CALLBACK, copy.deepcopy(self.start), callback)
        assert callback.supernet is not None
        return self.family(callback.supernet)

    def shallower(self, size: str) -> Any:
        """The first blocks, as many as reach the cost of a shape."""
        example = self.test.tensors[0][:1]
        supernet = nas.Supernet(copy.deepcopy(self.start))
        macs = nas.costs.MACs(supernet, example)(uniform(supernet.space, *SHAPES[size]))
        return demo_vit.shallower(self.start, macs, example)

    def alone(self) -> dict[str, float]:
        """A run for each size: the pretrained network cut to the subnetwork's shape."""
        found = {}
        for size, shape in SHAPES.items():
            supernet = nas.Supernet(copy.deepcopy(self.start))
            cut = supernet.extract(uniform(supernet.space, *shape))
            found[size] = self.accuracy(self.fit("that shape, alone", cut))
        return found

    def shallow(self) -> dict[str, float]:
        """A run for each size: the pretrained network's first blocks."""
        return {size: self.accuracy(self.fit("fewer blocks, alone", self.shallower(size))) for size in SHAPES}


def uniform(space: nas.SearchSpace, depth: int, heads: int, mlp: int) -> nas.Architecture:
    """The architecture with as many blocks, and in each of them as many heads and MLP units."""
    wanted = {"depth": depth, "heads": heads, "mlp": mlp}
    return space.canonical({name: wanted[name.rpartition(".")[2]] for name in space.names})


def run(seeds: Sequence[int], epochs: int, **settings: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All arms for all seeds.

    Returns:
        Accuracies in percent, by arm and seed, a column a size; and processor seconds, by arm and seed.
    """
    rows, seconds = {}, {}
    for seed in seeds:
        study = Study(seed)
        study.epochs = epochs  # of each arm; the pretraining stays the same
        arms = {
            CALLBACK: partial(study.subnetworks, **settings),
            "that shape, alone": study.alone,
            "fewer blocks, alone": study.shallow,
            "plain fine-tuning, sliced": study.sliced,
            "plain fine-tuning, ordered, sliced": study.ordered,
        }
        for arm, measure in arms.items():
            found = rows[arm, seed] = measure()
            shown = "  ".join(f"{size} {value:5.2f}" for size, value in found.items())
            spent = f"{study.seconds[arm]:.0f} s" if arm in study.seconds else ""
            print(f"seed {seed}  {arm:<36} {shown}  {spent}", flush=True)
        seconds[seed] = study.seconds
    table = pd.DataFrame.from_dict(rows, orient="index")[["100 %", *SHAPES]]
    table.index.names = ["arm", "seed"]
    return table, pd.DataFrame(seconds)


def markdown(table: pd.DataFrame, seconds: pd.DataFrame, arm_of_the_family: str = CALLBACK) -> str:
    """Means over seeds, and how far the family is ahead, with the standard error over seeds."""
    family = table.loc[arm_of_the_family]
    lines = [
        "| accuracy [%] at | " + " | ".join(table.columns) + " | processor time [s] |",
        "|---" * (len(table.columns) + 2) + "|",
    ]
    for arm in table.index.unique("arm"):
        cells = []
        for size in table.columns:
            values = table.loc[arm][size]
            cell = "" if values.isna().any() else f"{values.mean():.1f}"
            if cell and arm != arm_of_the_family:
                ahead = family[size] - values
                error = f" ± {ahead.std() / np.sqrt(len(ahead)):.1f}" if len(ahead) > 1 else ""
                cell += f" ({ahead.mean():+.1f}{error})"
            cells.append(cell)
        spent = f"{seconds.loc[arm].mean():.0f}" if arm in seconds.index else ""
        lines.append(f"| {arm} | {' | '.join(cells)} | {spent} |")
    return "\n".join(lines)


def main(seeds: list[int] = [0, 1, 2, 3, 4, 5], epochs: int = 16, page: str | None = None) -> None:  # noqa: B006
    """Measure, print the table, and write it into a page between its two marks."""
    torch.set_num_threads(1)
    with demo_vit.only_our_messages():
        written = markdown(*run(seeds, epochs, **SETTINGS))
    publish(written, page)


def publish(written: str, page: str | None, mark: str = "measured") -> None:
    """Print a table, and write it into a page between its two marks."""
    print(written)
    if page:
        text = Path(page).read_text()
        marks = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.DOTALL)
        Path(page).write_text(marks.sub(lambda m: f"{m[1]}{written}\n{m[2]}", text))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
