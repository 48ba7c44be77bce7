"""A frozen teacher: what a network was before it was changed, or another one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning_nas.callbacks._capture import Call, detached, tapped
from lightning_nas.callbacks._teaching import (
    OutputTeaching,
    join,
    join_at,
    outputs_of,
    refuse_other_classes,
    refuse_whole,
    returns_features,
)
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_nas.binary import release
from lightning_nas.distillation import (
    HiddenStates,
    OutputReader,
    Relations,
    normalized_mse,
    read_output,
    soft_kl,
)
from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet.layers import memo_without_hooks

__all__ = ["FrozenTeaching"]


class FrozenTeaching(OutputTeaching):
    """Adds ``weight * T^2 KL(teacher || network)`` to the user's loss, and distances inside.

    Args:
        distill_from: ``"float"``, a copy of the network as plain layers; another network; ``None``: nothing.
        distill_weight: at least 0.
        temperature: above 0.
        distill_hidden: a pattern of layers whose hidden states are compared, or a rule.
        output: reads the logits.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        distill_from: Literal["float"] | nn.Module | None,
        distill_weight: float,
        temperature: float,
        distill_hidden: str | HiddenStates | Relations | None,
        output: OutputReader | None,
    ) -> None:
        super().__init__(output)
        faults = []
        if distill_from is not None and not isinstance(distill_from, nn.Module) and distill_from != "float":
            faults.append(f"distill_from must be 'float', a network or None, got {distill_from!r}")
        if distill_from is None and distill_hidden is not None:
            faults.append("distill_hidden needs a teacher; give distill_from='float'")
        if distill_weight < 0:
            faults.append(f"distill_weight must be at least 0, got {distill_weight}")
        if temperature <= 0:
            faults.append(f"temperature must be above 0, got {temperature}")
        if faults:
            raise ValueError(f"{self._where}: {'; and '.join(faults)}.")
        self.distill_from, self.distill_weight, self.temperature = distill_from, distill_weight, temperature
        self.distill_hidden = (
            HiddenStates(layers=distill_hidden) if isinstance(distill_hidden, str) else distill_hidden
        )
        self.teacher: nn.Module | None = None
        self._follows_network = False  # until training begins, since a checkpoint may bring other weights
        self._restored: Mapping[str, Tensor] | None = None
        self._heard: dict[str, Tensor] = {}  # what modules inside the teacher gave
        self._network: nn.Module | None = None  # that is taught

    @property
    def _where(self) -> str:
        return type(self).__name__

    # --- the teacher

    def make_teacher(self, network: nn.Module) -> None:
        """Freeze the network to distil from.

        Raises:
            UnsupportedError: if it has other classes than the network.
        """
        if self.distill_from is None:
            return
        teacher = self.distill_from
        if not isinstance(teacher, nn.Module):
            teacher = release(copy.deepcopy(network, memo_without_hooks(network)))
            self._follows_network = True
        refuse_other_classes(network, teacher, self._where)
        self.teacher = teacher.requires_grad_(False).eval()

    def watch_both(self, trainer: Trainer, pl_module: LightningModule, network: nn.Module) -> None:
        """Begin to watch the network and its teacher, in ``on_fit_start``."""
        teacher = self.teacher
        if teacher is None:
            return
        refuse_whole(network, trainer, pl_module, self._where)
        patterns = () if self.distill_hidden is None else self.distill_hidden.patterns
        where = f"{self._where}: distill_hidden"
        self._network = network
        self.watch(network, pl_module, tapped(network, patterns, where))
        state = network.state_dict() if self._follows_network else self._restored
        if state is not None:
            teacher.load_state_dict({name: state[name] for name in teacher.state_dict()})
        self._follows_network, self._restored = False, None
        teacher.to(pl_module.device, next(network.parameters()).dtype)
        for name, module in tapped(teacher, patterns, where).items():

            def hear(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                self._heard[name] = read_output(output)

            self._undo.callback(module.register_forward_hook(hear).remove)

    def teacher_state(self) -> dict[str, Tensor] | None:
        """The weights of a copy; a network that was given is given again."""
        keeps = self.teacher is not None and not isinstance(self.distill_from, nn.Module)
        return self.teacher.state_dict() if keeps and self.teacher is not None else None

    def restore_teacher(self, state: Mapping[str, Tensor] | None) -> None:
        """Go on with the teacher of a checkpoint."""
        self._follows_network, self._restored = False, state

    # --- teaching

    @override
    def teach(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, calls: list[Call]) -> None:
        network, teacher, weight = self._network, self.teacher, self.distill_weight
        assert network is not None  # watch_both has set it,
        assert teacher is not None  # and nothing is captured before
        targets, heard = [], []
        for call in calls:
            self._heard = {}
            targets += outputs_of(teacher, trainer, pl_module, [call], self.read, self._where)
            heard.append(detached(self._heard))
        self._heard = {}
        is_features = returns_features(network)

        def distance(output: Tensor, target: Tensor) -> Tensor:
            if is_features:
                return weight * normalized_mse(output, target)
            return weight * soft_kl(output, target, self.temperature)

        extra = join(trainer, network, calls, targets, distance)
        if self.distill_hidden is not None:
            extra = extra + self._join_inside(trainer, network, self.distill_hidden, calls, heard)
        if not trainer.barebones:
            pl_module.log("distillation_loss", extra)

    def _join_inside(
        self,
        trainer: Trainer,
        network: nn.Module,
        rule: HiddenStates | Relations,
        calls: list[Call],
        heard: list[dict[str, Tensor]],
    ) -> Tensor:
        if not all(call.taps for call in calls):
            raise UnsupportedError(
                f"{self._where}: distill_hidden names modules that did not run in training_step (or "
                "torch.compile hides that they did). Name modules that run, or leave it out."
            )

        def distance(tensors: list[Tensor]) -> Tensor:
            left, losses = iter(tensors), []
            for call, theirs in zip(calls, heard, strict=True):
                own = {name: next(left) for name in call.taps}
                found = rule.distance(own, theirs, call.mask(network))
                if found is None:
                    raise UnsupportedError(
                        f"{self._where}: distill_hidden compares modules by name, and the network and its "
                        "teacher have none of the same name. Give a teacher of the same architecture, or "
                        "leave it out."
                    )
                losses.append(found)
            return rule.weight * torch.stack(losses).mean()

        return join_at(trainer, [tap for call in calls for tap in call.taps.values()], distance)
