"""What a sandwich step costs against standalone steps of the same architectures: time and peak memory.

Five training runs take turns, one step each a round: the plain run of the largest network, a standalone run
of each of two students, the sandwich of the three, and the largest alone under the callback. Ratios are of
medians. Peak memory is the growth of the process's resident set over its training, of one process each.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm.models.vision_transformer as vision_transformer
import torch
from lightning_nas.callbacks import SupernetTraining
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_nas as nas

ROUNDS, WARM_UP, BATCH = 25, 5, 32


@dataclass(frozen=True)
class Fixed:
    """Trains the same students in every step."""

    members: tuple[nas.Architecture, ...]

    def students(
        self, space: nas.SearchSpace, seed: int, step: int, progress: float
    ) -> tuple[nas.Architecture, ...]:
        return self.members


class Classifier(pl.LightningModule):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Turn(pl.Callback):
    """Waits for its turn before each step, and times the step."""

    def __init__(self) -> None:
        self.go, self.done, self.seconds = threading.Semaphore(0), threading.Semaphore(0), []

    def on_train_batch_start(self, *_: object) -> None:
        self.go.acquire()
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.done.release()


def vit() -> torch.nn.Module:
    return vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=6, num_classes=10
    )


def middle(space: nas.SearchSpace) -> nas.Architecture:
    return space.canonical({choice.name: choice.values[len(choice.values) // 2] for choice in space})


def train(net: torch.nn.Module, callbacks: list[pl.Callback], steps: int) -> None:
    data = TensorDataset(torch.randn(BATCH, 3, 64, 64), torch.randint(0, 10, (BATCH,)))
    trainer = pl.Trainer(
        max_epochs=steps, callbacks=callbacks, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(net), DataLoader(data, BATCH))


def runs() -> dict[str, tuple[torch.nn.Module, list[pl.Callback]]]:
    """Networks and callbacks by name of the run; the students are those of the sandwich."""
    supernet = nas.Supernet(vit())
    members = (middle(supernet.space), supernet.space.smallest)
    at_once = {"warmup": 0, "order": None, "students_learn_from": "teacher", "validate": ()}
    return {
        "largest": (vit(), []),
        "middle": (supernet.extract(members[0]), []),
        "smallest": (supernet.extract(members[1]), []),
        "sandwich": (vit(), [SupernetTraining(sampler=Fixed(members), **at_once)]),
        "largest under the callback": (vit(), [SupernetTraining(sampler="largest", **at_once)]),
    }


def step_seconds(
    made: dict[str, tuple[Any, list[pl.Callback]]], train: Callable[..., None], warm_up: int, rounds: int
) -> dict[str, float]:
    """The median time of a step of each run, one step of each a round."""
    turns = {name: Turn() for name in made}
    threads = [
        threading.Thread(target=train, args=(net, [turns[name], *callbacks], warm_up + rounds), daemon=True)
        for name, (net, callbacks) in made.items()
    ]
    for thread in threads:
        thread.start()
    for _ in range(warm_up + rounds):
        for turn in turns.values():
            turn.go.release()
            turn.done.acquire()
    for thread in threads:
        thread.join()
    return {name: statistics.median(turn.seconds[warm_up:]) for name, turn in turns.items()}


def resident(field: str) -> float:
    """MiB of this process that are in memory now (``VmRSS``) or were at most (``VmHWM``); on Linux."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def peak_memory(name: str) -> float:
    """MiB by which the resident set grew while one run trained, in a process of its own."""
    output = subprocess.run(
        [sys.executable, __file__, name], check=True, capture_output=True, text=True
    ).stdout
    return float(output.split()[-1])


def main() -> None:
    if len(sys.argv) > 1:  # one run, for peak_memory
        net, callbacks = runs()[sys.argv[1]]
        before = resident("VmRSS")
        train(net, callbacks, 4)
        print(resident("VmHWM") - before)
        return
    seconds = step_seconds(runs(), train, WARM_UP, ROUNDS)
    alone = seconds["largest"] + seconds["middle"] + seconds["smallest"]
    rows = [
        ("sandwich step / sum of standalone steps", seconds["sandwich"] / alone, 1.05),
        (
            "largest sampled alone / plain step",
            seconds["largest under the callback"] / seconds["largest"],
            1.01,
        ),
        ("peak memory of sandwich / plain step", peak_memory("sandwich") / peak_memory("largest"), 1.10),
    ]
    print("| measure | ratio | bound |\n| --- | --- | --- |")
    for name, ratio, bound in rows:
        print(f"| {name} | {ratio:.3f} | {bound:.2f} |")


if __name__ == "__main__":
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main()
