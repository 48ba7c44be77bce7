"""A race over the batches of the user's own validation: reads what is logged, and ends the loop early."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning_nas.callbacks._lightning import end_validation, sum_so_far
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.data import extract_batch_size
from typing_extensions import override

from lightning_nas.racing import Run

__all__ = ["BatchRace"]


class BatchRace(Callback):
    """Turns a mean that grows batch by batch into scores of batches, and stops where the race says so.

    A batch's score is what it added to the sum: of means ``v`` over ``n`` samples ``(n2 v2 - n1 v1) / (n2 -
    n1)``. All processes see the scores of all, and the first one decides.

    Args:
        monitor: the value that is raced by.
        run: the candidate's race.
    """

    def __init__(self, monitor: str, run: Run) -> None:
        self.monitor, self.run = monitor, run
        self.fault: str | None = None  # why it is no race
        self._seen = (0.0, 0.0)  # sum, samples
        self._samples = 0.0  # for metric objects, which do not count them

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *indices: Any
    ) -> None:
        if self.fault is not None:
            return
        self._samples += extract_batch_size(batch)
        so_far = sum_so_far(trainer, self.monitor, self._samples)
        if so_far is None:
            self.fault = "validation_step does not log it as a mean over the batches of one loader"
            return
        added = torch.tensor(
            [now - before for now, before in zip(so_far, self._seen, strict=True)], dtype=torch.float64
        )
        self._seen = so_far
        if trainer.world_size > 1:
            added = trainer.strategy.reduce(added.to(trainer.strategy.root_device), reduce_op="sum")
        total, samples = added.tolist()
        if samples == 0:
            return
        if not math.isfinite(total):
            self.fault = "it is not a number"
            return
        try:
            self.run.add(total / samples, weight=samples)
        except ValueError as error:  # validation data that is another one each time
            self.fault = str(error)
            return
        if trainer.strategy.broadcast(self.run.is_stopped) if trainer.world_size > 1 else self.run.is_stopped:
            self.run.is_stopped = True
            end_validation()

    def values(self, logged: dict[str, float]) -> dict[str, float]:
        """What to report of the candidate: all that was logged, or of a stopped one the estimate."""
        if self.run.is_stopped:
            return {self.monitor: self.run.value, "share": self.run.share}
        if self.fault is None:
            self.run.finish()
        elif self.fault != "it is not a number":
            rank_zero_warn(
                f"InstaTune: a candidate was measured on everything, since {self.monitor!r} cannot be raced "
                f"by: {self.fault}."
            )
        return {**logged, "share": 1.0}
