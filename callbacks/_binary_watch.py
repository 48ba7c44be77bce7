"""How binary layers fare while they train: flips of signs, indicators, scales, alarms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_nas.binary import BinaryLayer, mean_magnitude
from lightning_nas.estimators import estimating_error, gradient_stability

__all__ = ["BinaryWatch"]

_STILL_LOOKS, _STILL_STEPS = 4, 100  # in a row without a flip, before it is worth a word
_MEASURES = ("flip_rate", "estimating_error", "gradient_stability", "scale")

_REMEDIES = {
    "no gradient": "got no gradient at all. Let training_step use what they compute, or leave them real with "
    "exclude=.",
    "zero gradient": "have a gradient of zero: no weight is where the estimator lets gradients through. Give "
    "it a larger clip, such as nas.estimators.STE(clip=None), or Weights(is_relative=True), or clamp= from "
    "the start.",
    "still": "have a gradient, but no sign has changed for {steps} optimizer steps. The learning rate is "
    "small for the size of their weights: raise it, keep weights small (clamp=1.0), or use an estimator "
    "whose slope is large near 0.",
    "constant input": "see inputs whose codes are all the same, so they compute a constant. A ReLU, softmax "
    "or other function of one sign right before them hides it: move or drop it, give "
    "Activations(has_threshold=True), or leave them real with exclude=.",
    "zero scale": "have a scale of zero, and give nothing. Lower the learning rate or the weight decay, or "
    "use Weights(scale='channel'), which is not learned.",
    "scale not finite": "have a scale that is not finite. Look at the loss: the run has diverged; lower the "
    "learning rate or clip gradients.",
}


class BinaryWatch:
    """Looks at binary layers on every ``every``-th optimizer step, and warns once of each thing gone wrong.

    Args:
        where: name of the callback, for messages.
        every: optimizer steps from one look to the next; 0: never.
    """

    def __init__(self, where: str, every: int) -> None:
        self.where, self.every = where, every
        self.measured: dict[str, dict[str, float]] = {}  # layer -> what the last look saw
        self._codes: dict[str, Tensor] = {}  # at the last look
        self._still: dict[str, int] = {}  # layer -> looks in a row without a flip
        self._said: set[str] = set()  # layers
        self._gradients: dict[str, tuple[Tensor, Tensor]] = {}  # layer -> stability, largest size
        self._constant: dict[str, Tensor] = {}  # layer -> whether all codes of its input are the same
        self._undo = ExitStack()

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the optimizer step that is being made is one to look at."""
        return bool(self.every) and (trainer.global_step + 1) % self.every == 0 and trainer.is_global_zero

    def begin(self, trainer: Trainer, found: Mapping[str, BinaryLayer]) -> None:
        """Watch the inputs of a batch, if a look is due."""
        if self.is_due(trainer):
            for name, layer in found.items():
                if layer.input_bits != 32:
                    handle = layer.register_forward_pre_hook(self._see(name, layer))
                    self._undo.callback(handle.remove)

    def _see(self, name: str, watched: BinaryLayer) -> Callable[[nn.Module, Any], None]:
        def see(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if layer is watched and name not in self._constant:
                with torch.no_grad():
                    codes, _ = watched.input_codes(args[0].detach())
                self._constant[name] = codes.amin() == codes.amax()

        return see

    def gradients(self, trainer: Trainer, found: Mapping[str, BinaryLayer]) -> None:
        """Note the gradients of a step, unscaled and not clipped yet, if a look is due."""
        if self.is_due(trainer):
            for name, layer in found.items():
                if (gradient := layer.weight.grad) is not None:
                    self._gradients[name] = gradient_stability(gradient), gradient.abs().amax()

    def end(self) -> None:
        """Take the hooks off, at the end of a batch or a run."""
        self._undo.close()

    @torch.no_grad()
    def look(self, trainer: Trainer, found: Mapping[str, BinaryLayer]) -> None:
        """After an optimizer step: measure, log and warn, if the step is one to look at."""
        if not self.every or trainer.global_step % self.every or not trainer.is_global_zero:
            return
        rows = {name: self._row(name, layer) for name, layer in found.items()}
        table = torch.stack([torch.stack([v.float() for v in row]) for row in rows.values()]).tolist()
        trouble: dict[str, list[str]] = {}
        for name, values in zip(rows, table, strict=True):
            *measures, largest_gradient, largest_scale, constant = values
            self.measured[name] = dict(zip(_MEASURES, measures, strict=True))
            kind = self._fault(name, largest_gradient, largest_scale, bool(constant))
            if kind is not None and name not in self._said:
                self._said.add(name)
                trouble.setdefault(kind, []).append(name)
        self._gradients, self._constant = {}, {}
        self._log(trainer)
        for kind, names in trouble.items():
            remedy = _REMEDIES[kind].format(steps=self._patience * self.every)
            rank_zero_warn(f"{self.where}: binary layers {', '.join(names)} {remedy}")

    def _row(self, name: str, layer: BinaryLayer) -> list[Tensor]:
        """Measures of a layer, as tensors that stay on its device: the largest gradient and scale last."""
        nothing = torch.tensor(math.nan, device=layer.weight.device)
        flips = error = nothing
        before = self._codes.pop(name, None)
        if layer.weight_bits != 32:
            weight = layer.binary_weight.detach()
            self._codes[name] = codes = (weight if layer.weight_bits == 2 else weight >= 0).to(torch.int8)
            if before is not None and before.shape == codes.shape:
                flips = (codes != before).float().mean()
        if layer.weight_bits == 1:
            treated = layer.weights.treated(layer.weight.detach())
            if layer.weights.is_relative:
                unit = mean_magnitude(treated, "layer" if layer.weights.scale == "layer" else "channel")
                treated = treated / unit.view(-1, *(1,) * (treated.ndim - 1)).clamp(min=1e-12)
            error = estimating_error(treated, layer.weight_estimator)
        stability, largest = self._gradients.get(name, (nothing, torch.zeros_like(nothing) - 1))
        scale = layer.scale.detach().abs()
        constant = self._constant.get(name, torch.zeros_like(nothing))
        # A channel of zeros is no fault (pruned, or never used), a layer of them is.
        return [flips, error, stability, scale.mean(), largest, scale.amax(), constant]

    @property
    def _patience(self) -> int:
        """Looks in a row without a flip that are too many."""
        return max(_STILL_LOOKS, -(-_STILL_STEPS // self.every))

    def _fault(self, name: str, largest_gradient: float, scale: float, is_constant: bool) -> str | None:
        flips = self.measured[name]["flip_rate"]
        if not math.isnan(flips):
            self._still[name] = self._still.get(name, 0) + 1 if flips == 0 else 0
        if not math.isfinite(scale):
            return "scale not finite"
        if scale < 1e-12:
            return "zero scale"
        if is_constant:
            return "constant input"
        if self._still.get(name, 0) < self._patience:
            return None
        if largest_gradient < 0:
            return "no gradient"
        return "zero gradient" if largest_gradient == 0 else "still"

    def _log(self, trainer: Trainer) -> None:
        metrics = {
            f"binary/{measure}/{name}": value
            for name, row in self.measured.items()
            for measure, value in row.items()
            if not math.isnan(value)
        }
        flips = [row["flip_rate"] for row in self.measured.values() if not math.isnan(row["flip_rate"])]
        if flips:
            metrics["binary/flip_rate"] = sum(flips) / len(flips)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Counts, and what was said; the first look after a resume compares with the weights resumed from."""
        return {"still": dict(self._still), "said": sorted(self._said)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._still, self._said = dict(state["still"]), set(state["said"])
