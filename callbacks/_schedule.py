"""When each phase of a run begins, and the learning rate of the last one."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["LearningRateFactor", "Phases"]


class Phases:
    """The warm-up and the sandwich phase of a run, in optimizer steps.

    Args:
        warmup: a fraction of the run in [0, 1), rounded down, or a number of optimizer steps.

    Raises:
        ValueError: if it is negative, or a fraction that leaves no sandwich phase.
    """

    def __init__(self, warmup: float | int) -> None:
        is_fraction = isinstance(warmup, float)
        if isinstance(warmup, bool) or warmup < 0 or (is_fraction and warmup >= 1):
            raise ValueError(
                f"warmup must be a fraction of the run in [0, 1) or a whole number of optimizer steps, "
                f"got {warmup!r}."
            )
        self.warmup = warmup
        self.warmup_steps, self.total_steps = (0, math.inf) if is_fraction else (int(warmup), math.inf)

    def resolve(self, total_steps: float, where: str) -> None:
        """Fix the boundary once the length of the run is known.

        Raises:
            ValueError: if the warm-up is a fraction of an unknown length.
        """
        self.total_steps = total_steps if total_steps >= 0 else math.inf  # Lightning says -1 for no limit
        if not isinstance(self.warmup, float):
            self.warmup_steps = self.warmup
        elif self.warmup and math.isinf(self.total_steps):
            raise ValueError(
                f"{where}: warmup={self.warmup} is a fraction of the run, but its length is unknown "
                "(no max_epochs or max_steps, or data without a length); give warmup as a number of "
                "optimizer steps."
            )
        else:
            self.warmup_steps = math.floor(self.warmup * self.total_steps) if self.warmup else 0

    def progress(self, step: int) -> float:
        """Share of the sandwich phase that is over at this step, in [0, 1]; 0 where its length is unknown."""
        length = self.total_steps - self.warmup_steps
        return (
            0.0
            if math.isinf(length) or length <= 0
            else min(1.0, max(0.0, (step - self.warmup_steps) / length))
        )

    def __str__(self) -> str:
        rest = self.total_steps - self.warmup_steps
        if rest <= 0:
            return f"{self.warmup_steps} steps of warm-up, which is the whole run"
        length = "the rest" if math.isinf(rest) else rest
        return f"{self.warmup_steps} steps of warm-up, then {length} of sandwich"


class LearningRateFactor:
    """Multiplies the scheduled rate during an optimizer's step only, so that schedulers never see it.

    Args:
        factor: of the rate.
        optimizers: of the run.
    """

    def __init__(self, factor: float, optimizers: list[torch.optim.Optimizer]) -> None:
        self.factor = factor
        self._scheduled: dict[torch.optim.Optimizer, list[Any]] = {}
        self._steps_soon: set[torch.optim.Optimizer] = set()
        self._handles = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the step that is being taken, or the next one, run at the higher rate."""
        if optimizer in self._scheduled:  # inside optimizer.step(closure): the rate is read after the closure
            self._multiply(optimizer)
        else:
            self._steps_soon.add(optimizer)

    def remove(self) -> None:
        """Put scheduled rates back and take the hooks off."""
        for optimizer in list(self._scheduled):
            self._after(optimizer, (), {})
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._scheduled[optimizer] = [group["lr"] for group in optimizer.param_groups]
        if optimizer in self._steps_soon:  # a gradient scaler runs the closure before the step
            self._steps_soon.discard(optimizer)
            self._multiply(optimizer)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._scheduled.pop(optimizer), strict=True):
            group["lr"] = rate

    def _multiply(self, optimizer: torch.optim.Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._scheduled[optimizer], strict=True):
            group["lr"] = rate * self.factor
