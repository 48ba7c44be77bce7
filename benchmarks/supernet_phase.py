"""What can the supernet phase do? One setting of the callback changed at a time, all runs at equal time.

Two tasks: ``digits`` (the ViT and images of ``worth_it.py``) and ``sentences`` (MiniLM and film reviews, as
in ``worth_it_bert.py``). A setting whose step costs more takes fewer steps: the time of a step of each one
is measured first, in rounds that interleave all, and the length of each run follows from the medians.

Measured on data that no run saw: the accuracy of the full network, the mean accuracy of random subnetworks,
the same ones for all settings of a seed, and that of the smallest.

Run: python benchmarks/supernet_phase.py digits --page docs/the-supernet-phase.md
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SupernetTraining
from lightning_nas.recipes import demo_vit
from lightning_nas.recipes.sentiment import SentimentData, minilm_folder
from torch.utils.data import DataLoader
from worth_it import Study, publish

import lightning_nas as nas
from lightning_nas.modules import ImageClassifier, SequenceClassifier

DEFAULT = "Sandwich(random=2)"
SETTINGS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "warmup=0": {"warmup": 0},
    "warmup=0.15": {"warmup": 0.15},
    "warmup=0.5": {"warmup": 0.5},
    "order='magnitude'": {"order": "magnitude"},
    "order=None": {"order": None},
    "students_learn_from='teacher'": {"students_learn_from": "teacher"},
    "students_learn_from='task'": {"students_learn_from": "task"},
    "students_learn_from=InstaTuneLoss(0.3)": {"students_learn_from": nas.InstaTuneLoss(alpha=0.3)},
    "temperature=2": {"temperature": 2.0},
    "regularize='all'": {"regularize": "all"},
    "lr_factor=0.5": {"lr_factor": 0.5},
    "lr_factor=2": {"lr_factor": 2.0},
    "lr_factor=4": {"lr_factor": 4.0},
    "lr_factor=6": {"lr_factor": 6.0},
    "Random(1), as InstaTune": {"sampler": nas.Random(1)},
    "Sandwich(random=0)": {"sampler": nas.Sandwich(random=0)},
    "Sandwich(random=1)": {"sampler": nas.Sandwich(random=1)},
    "Sandwich(random=4)": {"sampler": nas.Sandwich(random=4)},
    "MultiArchitectural(parts=4)": {"sampler": nas.MultiArchitectural(parts=4)},
    "Sandwich(random=1), warmup=0.15": {"sampler": nas.Sandwich(random=1), "warmup": 0.15},
    "Sandwich(random=1), warmup=0.5": {"sampler": nas.Sandwich(random=1), "warmup": 0.5},
    "Sandwich(random=1), lr_factor=2": {"sampler": nas.Sandwich(random=1), "lr_factor": 2.0},
    "Sandwich(random=1), order=None": {"sampler": nas.Sandwich(random=1), "order": None},
}
BASE: dict[str, Any] = {"sampler": nas.Sandwich(random=2)}  # what each setting changes
INSIDE = "with hidden states"  # its layers have other names in each network
RUN: dict[str, Any] = {
    "logger": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "gradient_clip_val": 1.0,
    **demo_vit.QUIET,
}


class Digits:
    """A ViT of 6 blocks, pretrained on small digits, on 2,000 images of MNIST."""

    plain_steps = 2_250  # as long as one run of worth_it.py: 16 epochs with the sandwich
    blocks = "blocks.*"
    has_dropout = False
    settings: Mapping[str, Any] = {}

    def __init__(self, seed: int) -> None:
        study = Study(seed)
        self.start = ImageClassifier(study.start, num_classes=10, lr=2e-3, layer_decay=1.0)
        self.data = DataLoader(study.train, 32, shuffle=True)
        self.measured_on = study.test

    def accuracy(self, module: Any) -> float:
        """In percent, on 3,000 images."""
        return 100 * demo_vit.accuracy(module.model, self.measured_on)


class Sentences:
    """MiniLM on 2,000 sentences of film reviews."""

    plain_steps = 280
    blocks = "encoder.layer.*"
    has_dropout = True
    settings: Mapping[str, Any] = {"head": "head"}

    def __init__(self, seed: int) -> None:
        pl.seed_everything(seed, verbose=False)
        self.start = SequenceClassifier(minilm_folder(), num_labels=2, pooling="mean", lr=5e-5)
        data = SentimentData(train=2_000, test=1_000, seed=seed)
        data.setup()
        self.data, self.measured_on = data.train_dataloader(), data.test_dataloader()

    @torch.no_grad()
    def accuracy(self, module: Any) -> float:
        """In percent, on 1,000 sentences."""
        module.eval()
        right, seen = 0, 0
        for batch in self.measured_on:
            labels = batch["labels"]
            logits = module(**{name: tensor for name, tensor in batch.items() if name != "labels"})
            right, seen = right + int((logits.argmax(-1) == labels).sum()), seen + len(labels)
        return 100 * right / seen


TASKS = {"digits": Digits, "sentences": Sentences}


class StepTimes(pl.Callback):
    """Processor time of each step but the first two."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Note when it begins."""
        self._began = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """Note what it took."""
        if trainer.global_step > 2:
            self.seconds.append(time.process_time() - self._began)


def settings_for(task: Any) -> dict[str, dict[str, Any]]:
    """All settings, as far as the task can have them; a rule of students that need no task has no head."""
    states = nas.HiddenStates(task.blocks, kind="cosine")
    found = {}
    for name, changed in {**SETTINGS, INSIDE: {"students_learn_from": states}}.items():
        if "regularize" in changed and not task.has_dropout:
            continue
        settings = {**task.settings, **changed}
        if changed.get("students_learn_from") == "teacher" or name == INSIDE:
            settings.pop("head", None)
        found[name] = settings
    return found


def step_costs(task: Any, settings: Mapping[str, Mapping[str, Any]], rounds: int) -> dict[str, float]:
    """The median time of a step of the sandwich phase, in steps of plain training."""
    times: dict[str, list[float]] = {name: [] for name in ("plain", *settings)}
    for _ in range(rounds):
        for name in times:
            watch = StepTimes()
            callbacks: list[pl.Callback] = [watch]
            if name != "plain":
                callbacks.insert(0, SupernetTraining(validate=(), **{**BASE, **settings[name], "warmup": 0}))
            pl.Trainer(max_steps=8, max_epochs=-1, callbacks=callbacks, **RUN).fit(
                copy.deepcopy(task.start), task.data
            )
            times[name] += watch.seconds
    plain = statistics.median(times.pop("plain"))
    return {name: statistics.median(seconds) / plain for name, seconds in times.items()}


def trained(task: Any, seed: int, members: int, steps: int, settings: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies after one run with the callback."""
    module = copy.deepcopy(task.start)
    callback = SupernetTraining(validate=(), seed=seed, **{**BASE, **settings})
    pl.seed_everything(seed, verbose=False)
    pl.Trainer(max_steps=steps, max_epochs=-1, callbacks=[callback], **RUN).fit(module, task.data)
    supernet = callback.supernet
    assert supernet is not None
    rng = np.random.default_rng(seed)
    family = [supernet.space.sample(rng) for _ in range(members)]
    found = {"full": task.accuracy(module)}
    for architecture in (*family, supernet.space.smallest):
        with supernet.using(architecture):
            found[architecture.key] = task.accuracy(module)
    smallest = found[supernet.space.smallest.key]
    return {
        "full": found["full"],
        "family": statistics.fmean(found[architecture.key] for architecture in family),
        "smallest": smallest,
    }


def plain(task: Any, seed: int, members: int) -> dict[str, float]:
    """The full network after plain training of that time, and slices of it."""
    return trained(task, seed, members, task.plain_steps, {"sampler": "largest"})


def run(task_name: str, seeds: list[int], members: int, only: list[str]) -> pd.DataFrame:
    """All settings for all seeds.

    Returns:
        Accuracies in percent, and the cost and number of steps, by setting and seed.
    """
    make = TASKS[task_name]
    task = make(seeds[0])
    settings = {name: chosen for name, chosen in settings_for(task).items() if not only or name in only}
    costs = step_costs(task, settings, rounds=3)
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for seed in seeds:
        task = make(seed)
        rows["plain training", seed] = {"cost": 1.0, "steps": task.plain_steps, **plain(task, seed, members)}
        for name, chosen in settings.items():
            warmup = chosen.get("warmup", 0.3)
            steps = round(task.plain_steps / (warmup + (1 - warmup) * costs[name]))
            found = trained(task, seed, members, steps, chosen)
            rows[name, seed] = {"cost": costs[name], "steps": steps, **found}
            shown = "  ".join(f"{what} {value:5.2f}" for what, value in found.items())
            print(f"seed {seed}  {name:<40} {costs[name]:.2f} x {steps:5d} steps  {shown}", flush=True)
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.names = ["setting", "seed"]
    return table


def markdown(table: pd.DataFrame) -> str:
    """Means over seeds; in brackets the difference to the defaults and its standard error over seeds."""
    base = table.loc[DEFAULT]
    lines = [
        "| setting | time of a step | steps | full network | family | smallest |",
        "|---|---|---|---|---|---|",
    ]
    for name in table.index.unique("setting"):
        rows, cells = table.loc[name], []
        for what in ("full", "family", "smallest"):
            cell = f"{rows[what].mean():.1f}"
            if name != DEFAULT:
                ahead = rows[what] - base[what]
                error = f" ± {ahead.std() / np.sqrt(len(ahead)):.1f}" if len(ahead) > 1 else ""
                cell += f" ({ahead.mean():+.1f}{error})"
            cells.append(cell)
        cost, steps = rows["cost"].mean(), rows["steps"].mean()
        lines.append(f"| `{name}` | {cost:.2f} | {steps:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    task: Literal["digits", "sentences"],
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    members: int = 12,
    only: list[str] = [],  # noqa: B006
    page: str | None = None,
) -> None:
    """Measure, print the table, and write it into a page between the two marks of the task.

    Args:
        task: which one.
        seeds: of the data, the start and the plan of students.
        members: random subnetworks in the mean.
        only: names of settings; empty: all.
        page: file to write the table into.
    """
    torch.set_num_threads(1)
    with demo_vit.only_our_messages():
        publish(markdown(run(task, seeds, members, only)), page, task)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
