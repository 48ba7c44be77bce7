"""Run by test_ddp.py: training runs on two processes, each writing what it ends with."""

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import Binarization, InstaTune, SelfDistillation, SupernetTraining
from torch.utils.data import DataLoader, DistributedSampler

from lightning_nas import Depth, Racing, SearchSpace
from lightning_nas.binary import Activations, Weights
from tests import user_modules as users

RUNS = {  # name -> students_learn_from, micro-batches a step
    "teacher": ("teacher", 1),
    "both": ("both", 2),
    "at the start": ("teacher", 1),
    "search": ("both", 1),
    "race": ("both", 1),
    "itself": ("itself", 2),
    "binary": ("the float network", 2),
    "blocks of students alone": ("task", 2),
}
OTHER_BLOCKS = SearchSpace([Depth("depth", (2, 3), keeps=((0, 3), (0, 1, 2)))])


class Halves(pl.LightningDataModule):
    """Each process takes every second image, in order: both their batches k are batch k of one process."""

    def train_dataloader(self):
        data = users.images(24)
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=8 // self.trainer.world_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(users.images(24, 1), batch_size=4)


class ManyBatches(Halves):
    """Enough of them for a race, other ones on each process."""

    def val_dataloader(self):
        data = users.images(360, 1)
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=4, sampler=sampler)


def run(name: str, folder: Path, **trainer) -> pl.Trainer:
    learn, accumulate = RUNS[name]
    settings = {"warmup": 0 if name == "at the start" else 2, "students_learn_from": learn, "validate": ()}
    net = users.tiny_vit()
    if name == "blocks of students alone":  # drawn: 2, 3, 3, 2; at 3 block 3 has no gradient at all
        settings |= {"space": OTHER_BLOCKS, "sampler": "random", "order": None, "warmup": 0, "seed": 1}
        net = users.tiny_vit(depth=4)
    if name == "search":
        callback = InstaTune(budget=4, folder=folder / "found", **settings)
    elif name == "race":  # for small inaccurate networks: of a trained family most are clearly beaten
        race = {"mode": "min", "strategy": "random", "racing": Racing(front=10)}
        callback = InstaTune(budget=6, folder=folder / "race", **race, **settings)
    elif name == "itself":
        callback = SelfDistillation(snapshots=2, unit="step", ema=0.5)
    elif name == "binary":  # a learned scale of inputs moves by the root of their number, here without one
        learned, unscaled = Weights(scale="learned"), Activations(scale=None)
        callback = Binarization(weights=learned, activations=unscaled, distill_from="float")
    else:
        callback = SupernetTraining(**settings)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=6 if name == "race" else 2, precision="64-true", callbacks=[callback],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **trainer,
    )  # fmt: skip
    trainer.fit(users.PlainClassifier(net), ManyBatches() if name == "race" else Halves())
    return trainer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in RUNS:
        unused = "_find_unused_parameters_true" if name == "blocks of students alone" else ""
        trainer = run(name, folder, strategy=f"ddp{unused}", devices=2)
        torch.save(trainer.lightning_module.state_dict(), folder / f"{name}{trainer.global_rank}.pt")
        if name == "search":
            front = trainer.callbacks[0].result.front
            rows = [[dict(c.architecture), c.values["macs"], c.values["val_acc"]] for c in front]
            (folder / f"front{trainer.global_rank}.json").write_text(json.dumps(rows))
        if name == "race":
            rows = [[dict(c.architecture), c.values] for c in trainer.callbacks[0].result.candidates]
            (folder / f"race{trainer.global_rank}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
