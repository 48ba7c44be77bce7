"""Learning rates over a run, and the settings of an optimizer that the modules share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig

__all__ = [
    "SCHEDULES",
    "exponential_constant_ending",
    "faults_of_optimizer",
    "scheduled",
    "warmup_cosine",
    "warmup_linear",
]


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """The factor of the learning rate: up in a line over ``warmup`` steps, then down along a half cosine.

    ``(step + 1) / warmup`` before the end of the warm-up, ``(1 + cos(pi * progress)) / 2`` after it, where
    progress is the share of the remaining ``total - warmup`` steps that is done.

    Args:
        step: optimizer steps done, at least 0.
        warmup: optimizer steps of the rise, 0 for none.
        total: optimizer steps of the whole run.

    Returns:
        A number in [0, 1]; 0 from ``total`` on.

    Example:
        >>> [round(warmup_cosine(step, warmup=2, total=6), 3) for step in range(7)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * _progress(step, warmup, total)))


def warmup_linear(step: int, warmup: int, total: int) -> float:
    """The factor of the learning rate: up in a line over ``warmup`` steps, then down in a line to 0.

    Args:
        step: optimizer steps done, at least 0.
        warmup: optimizer steps of the rise, 0 for none.
        total: optimizer steps of the whole run.

    Returns:
        A number in [0, 1]; 0 from ``total`` on.

    Example:
        >>> [round(warmup_linear(step, warmup=2, total=6), 3) for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def exponential_constant_ending(
    step: int, warmup: int, total: int, *, floor: float = 0.05, ending: float = 0.3
) -> float:
    """The factor of the learning rate: up in a line, down by the same factor each step, then constant.

    The rate halves in equal times until it is ``floor`` of its peak, when ``1 - ending`` of the steps behind
    the warm-up are over, and stays there: the small networks of a family go on learning, and the large ones
    move about instead of overfitting.

    Args:
        step: optimizer steps done, at least 0.
        warmup: optimizer steps of the rise, 0 for none.
        total: optimizer steps of the whole run.
        floor: of the factor, in (0, 1].
        ending: share of the run behind the warm-up in which the rate is constant, in [0, 1).

    Returns:
        A number in [0, 1].

    Example:
        >>> [round(exponential_constant_ending(step, 0, 10, floor=0.25, ending=0.6), 3) for step in range(6)]
        [1.0, 0.707, 0.5, 0.354, 0.25, 0.25]

    Reference: Yu et al., BigNAS, ECCV 2020, section 3.3: exponential decay with constant ending at 5 %.
    """
    if step < warmup:
        return (step + 1) / warmup
    return float(max(floor, floor ** (_progress(step, warmup, total) / (1 - ending))))


def _progress(step: int, warmup: int, total: int) -> float:
    return min(1.0, (step - warmup) / max(1, total - warmup))


SCHEDULES: dict[str, Callable[..., float]] = {
    "cosine": warmup_cosine,
    "linear": warmup_linear,
    "constant-ending": exponential_constant_ending,
}


def faults_of_optimizer(
    lr: float, weight_decay: float, layer_decay: float, warmup: int | float, schedule: str
) -> list[str]:
    """What is wrong with these settings, each as a clause."""
    faults = []
    if lr <= 0:
        faults.append(f"lr must be above 0, got {lr}")
    if weight_decay < 0:
        faults.append(f"weight_decay must be at least 0, got {weight_decay}")
    if not 0 < layer_decay <= 1:
        faults.append(f"layer_decay must be in (0, 1], got {layer_decay}")
    if warmup < 0 or (isinstance(warmup, float) and warmup >= 1):
        faults.append(f"warmup must be a share in [0, 1) or a number of steps as an int, got {warmup!r}")
    if schedule not in SCHEDULES:
        faults.append(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    return faults


def scheduled(
    module: LightningModule, optimizer: torch.optim.Optimizer, schedule: str, warmup: int | float
) -> OptimizerLRSchedulerConfig:
    """What ``configure_optimizers`` returns: the optimizer, its rate scheduled by the step.

    Raises:
        ValueError: if the length of the run is not known.
    """
    total = module.trainer.estimated_stepping_batches
    if not math.isfinite(total):
        raise ValueError(
            f"{type(module).__name__}: the {schedule} schedule needs the length of the run, which is unknown "
            "here. Give the Trainer max_epochs or max_steps, or override configure_optimizers."
        )
    steps = warmup if isinstance(warmup, int) else round(warmup * total)
    factor = partial(SCHEDULES[schedule], warmup=steps, total=int(total))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
