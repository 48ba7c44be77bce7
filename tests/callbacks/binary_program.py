"""Run by test_binary_checkpoints.py: goes on from checkpoints in a process that has seen nothing before."""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import Binarization
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_nas.binary import Weights
from tests import user_modules as users

SETTINGS = {"activations": 1, "distill_from": "float", "stages": "weights-first"}


def run(folder: Path, start: str | None, epochs: int = 2, keep: str | None = None, is_binary: bool = True):
    """A run from a checkpoint; its weights and the validation of its last epoch."""
    callbacks = [Binarization(weights=Weights(scale="learned"), **SETTINGS)] if is_binary else []
    if keep:
        callbacks.append(ModelCheckpoint(folder, keep, save_top_k=-1, every_n_epochs=1))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=callbacks, logger=False,
        enable_checkpointing=bool(keep), enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = users.PlainClassifier(users.tiny_vit(5))
    trainer.fit(module, users.loader(), users.loader(), ckpt_path=start and folder / f"{start}.ckpt")
    return module.state_dict(), {n: float(v) for n, v in trainer.callback_metrics.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    float_state, _ = run(folder, "float")
    resumed, _ = run(folder, "epoch=0")
    callback = Binarization(weights=Weights(scale="learned"), **SETTINGS)
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[callback])
    last = folder / "epoch=1.ckpt"
    (validated,) = trainer.validate(users.PlainClassifier(), users.loader(), ckpt_path=last, verbose=False)
    torch.save({"float": float_state, "resumed": resumed, "validated": validated}, folder / "fresh.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
