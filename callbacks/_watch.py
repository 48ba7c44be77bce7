"""How the members of a family fare while they train: loss curves, counts, alarms that say what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_nas.space import Architecture, SearchSpace

__all__ = ["Watch"]

_ENOUGH_STEPS = 20  # of the sandwich, before an option that was never trained is worth a word
_NOTABLE = (
    0.02  # share of a metric by which the smallest network must be better than the largest, to be worth one
)


class Watch:
    """Keeps what happened to each role (largest, smallest, random), and warns once of each thing gone wrong.

    Args:
        where: name of the callback, for messages.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.trained: Counter[str] = Counter()  # "choice=option" -> students that had it
        self.curves: dict[str, list[tuple[int, float]]] = {}  # role -> (optimizer step, mean training loss)
        self._losses: dict[str, list[Tensor]] = {}  # of the optimizer step that is being made
        self._worse: set[str] = set()  # metrics in which the smallest network was the better one last time
        self._said: set[str] = set()

    def student(self, space: SearchSpace, architecture: Architecture, loss: Tensor) -> None:
        """Note a student's pass."""
        role = "smallest" if architecture == space.smallest else "random"
        self._losses.setdefault(role, []).append(loss)
        self._count(space, architecture)

    def mixture(self, space: SearchSpace, members: Sequence[Architecture], loss: Any) -> None:
        """Note one pass that several members shared, and its loss."""
        for member in members:
            self._count(space, member)
        if isinstance(loss, Tensor):
            self._losses.setdefault("mixture", []).append(loss.detach())

    def _count(self, space: SearchSpace, architecture: Architecture) -> None:
        self.trained.update(f"{name}={architecture[name]}" for name in space.active(architecture))

    def largest(self, loss: Any) -> None:
        """Note the user's own loss, where students were trained beside it."""
        if self._losses and "mixture" not in self._losses and isinstance(loss, Tensor):
            self._losses.setdefault("largest", []).append(loss.detach())

    def step(self, trainer: Trainer) -> None:
        """Log the mean losses of an optimizer step, as often as the Trainer logs."""
        step, interval = trainer.global_step, getattr(trainer, "log_every_n_steps", 50)  # declared nowhere
        losses, self._losses = self._losses, {}
        if not losses or step % max(1, interval):
            return
        means = {role: float(torch.stack(values).float().mean()) for role, values in losses.items()}
        for role, value in means.items():
            self.curves.setdefault(role, []).append((step, value))
            first = self.curves[role][0][1]
            # A student's loss may rise while its teacher grows surer, but hardly by so much.
            if role != "largest" and not value <= max(2 * first, first + 1.0):
                self._say(
                    "diverging",
                    f"students diverge: the loss of the {role} subnetworks is {value:.4g} at step {step} and "
                    f"began at {first:.4g}. Lower lr_factor or the learning rate, or clip gradients.",
                )
        for logger in trainer.loggers:
            logger.log_metrics({f"supernet_loss/{role}": value for role, value in means.items()}, step)

    def validated(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Log values by ``<metric>/<role>``; warn if the smallest network was better twice in a row."""
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), trainer.global_step)
        worse = set()
        for name in {key.rsplit("/", 1)[0] for key in values}:
            largest, smallest = values.get(f"{name}/largest"), values.get(f"{name}/smallest")
            sign = 1 if "acc" in name.lower() else -1 if "loss" in name.lower() else 0
            if largest is None or smallest is None:
                continue
            if sign * (smallest - largest) > _NOTABLE * abs(largest):
                worse.add(name)
        for name in sorted(worse & self._worse)[:1]:
            self._say(
                "largest is worse",
                f"{name} of the smallest network ({values[f'{name}/smallest']:.4g}) is better than of the "
                f"largest ({values[f'{name}/largest']:.4g}), for the second time. The largest may be "
                "overfitting or undertrained: lengthen warmup, lower lr_factor, or regularise it more.",
            )
        self._worse = worse

    def ended(self, trainer: Trainer, space: SearchSpace, sandwich_steps: int, warmup_steps: int) -> None:
        """Warn if no subnetwork was trained, or an option never."""
        if sandwich_steps == 0:
            self._say(
                "no sandwich",
                f"the run ended after {trainer.global_step} optimizer steps, before its sandwich phase "
                f"(which begins after {warmup_steps}): no subnetwork was trained. Train longer, "
                "stop later or lower warmup.",
            )
        missing = list(self._never_trained(space))
        if missing and sandwich_steps >= _ENOUGH_STEPS:
            self._say(
                "never trained",
                f"never trained in {sandwich_steps} sandwich steps: {', '.join(missing[:10])}"
                f"{' ...' if len(missing) > 10 else ''}. Train longer, draw more random members or restrict "
                "the space.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Counts and curves."""
        return {"trained": dict(self.trained), "curves": self.curves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.trained = Counter(state["trained"])
        self.curves = {
            role: [(step, loss) for step, loss in curve] for role, curve in state["curves"].items()
        }

    def _never_trained(self, space: SearchSpace) -> Iterable[str]:
        options = (f"{choice.name}={value}" for choice in space.choices for value in choice.values)
        return (option for option in options if not self.trained[option])

    def _say(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            rank_zero_warn(f"{self.where}: {message}")
