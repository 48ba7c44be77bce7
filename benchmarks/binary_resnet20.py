"""ResNet-20 with binary weights and activations on MNIST images: each estimator, five seeds, and a control.

    python -m benchmarks.binary_resnet20 > table.md

3,000 images of 10 x 10 pixels to train on, 1,000 others to test, SGD from scratch. In the control the binary
layers stay as they began and everything else is trained: what an estimator is worth is what it adds to that.
Runs that are done are kept in --results and not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import Binarization
from lightning_nas.recipes.digits import mnist_part
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

import lightning_nas as nas
from lightning_nas.binary import Activations, Weights
from lightning_nas.estimators import sine_penalty
from lightning_nas.evaluation.intervals import mean_and_interval
from lightning_nas.modules import ImageClassifier

CODED = {  # how weights are scaled, as each paper has it
    "frozen": Weights(),
    "ste": Weights(),
    "bireal": Weights(),
    "ede": Weights(scale="power_of_two", treatment="standardised"),
    "dsq": Weights(),
    "reste": Weights(scale="layer", grad_through_scale=True),
    "biper": Weights(scale="learned"),
}
CIFAR = {"biper": "86.98", "reste": "86.75", "ede": "86.5"}  # ResNet-20 on CIFAR-10, from their repositories
NAMES = {"float": "float network", "frozen": "frozen binary layers", "ede": "ede, Libra weights (IR-Net)"}


class Penalised(ImageClassifier):
    """With BiPer's penalty of both stages."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        layers = nas.binary.layers(self.model).values()
        return super().training_step(batch, batch_idx) + 0.037 * sum(
            sine_penalty(layer.weight) for layer in layers
        )


def run(name: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train one network and test it."""
    pl.seed_everything(seed, verbose=False)
    network = nas.models.resnet20(in_chans=1)
    train, test = mnist_part("train", pool=2), mnist_part("test", pool=2)
    start = copy.deepcopy(network)
    callbacks: list[pl.Callback] = []
    if name != "float":
        coded = {"weights": CODED[name], "activations": Activations(scale=None)}
        estimator = "ste" if name == "frozen" else name
        nas.binarize(start, estimator, **coded)
        if name == "frozen":
            network = copy.deepcopy(start)
            for layer in nas.binary.layers(network).values():
                layer.weight.requires_grad_(False)
        else:
            stages = "biper" if name == "biper" else None  # the square wave in the second half
            callbacks = [Binarization(estimator, **coded, stages=stages, log_every=0)]
    settings: dict[str, Any] = {
        "num_classes": 10, "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "layer_decay": 1.0,
        "warmup": 0.05,
    }  # fmt: skip
    module = (Penalised if name == "biper" else ImageClassifier)(network, **settings)
    quiet: dict[str, Any] = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu",
        "enable_model_summary": False,
    }  # fmt: skip
    trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, **quiet)
    started = time.process_time()
    trainer.fit(module, DataLoader(train, 64, shuffle=True, drop_last=True))
    seconds = time.process_time() - started
    (found,) = trainer.test(module, DataLoader(test, 250), verbose=False)
    pairs = zip(nas.binary.layers(start).values(), nas.binary.layers(network).values(), strict=True)
    flips = [float((a.binary_weight != b.binary_weight).float().mean()) for a, b in pairs]
    flipped = sum(flips) / len(flips) if flips else None
    return {"name": name, "seed": seed, "accuracy": found["test_acc"], "seconds": seconds, "flipped": flipped}


def table(runs: list[dict[str, Any]]) -> str:
    """The runs as markdown, the best mean first."""
    lines = [
        "| estimator | accuracy, mean [95 %] | over the control | signs flipped | CIFAR-10, from its paper |",
        "|---|---|---|---|---|",
    ]
    accuracies = {r["name"]: [s["accuracy"] for s in runs if s["name"] == r["name"]] for r in runs}
    means = {name: mean_and_interval(values) for name, values in accuracies.items()}
    for name in sorted(means, key=lambda n: -means[n].estimate):
        mean, flips = means[name], [r["flipped"] for r in runs if r["name"] == name]
        control = means["frozen"].estimate if "frozen" in means else float("nan")
        over = "" if name == "frozen" else f"{mean.estimate - control:+.3f}"
        flipped = "" if name in ("float", "frozen") else f"{sum(flips) / len(flips):.0%}"
        interval = f"{mean.estimate:.3f} [{mean.low:.3f}, {mean.high:.3f}]"
        lines.append(f"| {NAMES.get(name, name)} | {interval} | {over} | {flipped} | {CIFAR.get(name, '')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--only", nargs="*", default=["float", *CODED])
    parser.add_argument("--results", type=Path, default=Path("binary_resnet20.jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    given.results.touch()
    done = [json.loads(line) for line in given.results.read_text().splitlines()]
    for seed in range(given.seeds):
        for name in given.only:
            if not any((r["name"], r["seed"]) == (name, seed) for r in done):
                done.append(run(name, seed, given.epochs))
                with given.results.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    print(table([r for r in done if r["seed"] < given.seeds and r["name"] in given.only]))


if __name__ == "__main__":
    main()
