"""How the weights and the inputs of a binary layer are coded, as plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lightning_nas.binary.treatments import TREATMENTS
from lightning_nas.estimators import Estimator
from lightning_nas.registry import nearest

__all__ = ["Activations", "WeightScale", "Weights"]

WeightScale = Literal["channel", "layer", "learned", "power_of_two"]
InputScale = Literal["learned", "xnor"]


@dataclass(frozen=True)
class Weights:
    r"""How weights are coded.

    Args:
        bits: 1, codes -1 and +1; 2, ternary: -1, 0 and +1; 32, as they are.
        scale: what the product is multiplied with. ``"channel"``: the mean of \|W\| of each output channel
            (of ternary codes 4/3 of it); ``"layer"``: of the whole layer, one number, as ReSTE has it;
            ``"learned"``: a parameter of each channel that starts there; ``"power_of_two"``: the nearest one
            to it, as IR-Net has it; None: nothing. Embeddings have a scale for each row.
        grad_through_scale: whether gradients flow through an analytic scale to the weights, too.
        treatment: what is done to weights first, and the scale is taken of: ``"centred"``,
            ``"standardised"``, ``"recu"``, or a function of the weight ``(out, ...)``. None: nothing.
        is_relative: whether an estimator sees weights in units of their mean size. Then its thresholds
            (ReSTE's clip at 1.5) mean the same in every layer, and the gradient is not made small by the
            scale.

    Raises:
        ValueError: for values out of range, or that do not fit each other.
    """

    bits: int = 1
    scale: WeightScale | None = "channel"
    grad_through_scale: bool = False
    treatment: str | Callable[[Tensor], Tensor] | None = None
    is_relative: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 32):
            raise ValueError(f"Weights: bits must be 1, 2 (ternary) or 32, got {self.bits!r}.")
        if self.scale is not None and self.scale not in get_args(WeightScale):
            raise ValueError(
                f"Weights: unknown scale {self.scale!r}. {nearest(self.scale, get_args(WeightScale))}"
            )
        if isinstance(self.treatment, str) and self.treatment not in TREATMENTS:
            raise ValueError(
                f"Weights: unknown treatment {self.treatment!r}. {nearest(self.treatment, TREATMENTS)}"
            )
        if self.grad_through_scale and self.scale not in ("channel", "layer"):
            raise ValueError(
                "Weights: grad_through_scale is about the scales 'channel' and 'layer', got "
                f"scale={self.scale!r}."
            )

    def treated(self, weight: Tensor) -> Tensor:
        """The weight after its treatment."""
        if self.treatment is None:
            return weight
        treatment = TREATMENTS[self.treatment] if isinstance(self.treatment, str) else self.treatment
        return treatment(weight)

    @classmethod
    def of(cls, weights: int | Literal["ternary"] | Weights) -> Weights:
        """The form itself, or that of bits alone; ``"ternary"`` is 2."""
        if isinstance(weights, Weights):
            return weights
        return cls(bits=2 if weights == "ternary" else weights)


@dataclass(frozen=True)
class Activations:
    """How inputs of a layer are coded.

    Args:
        bits: 1 or 32, as they are. Codes are -1 and +1, and 0 and 1 of an input that is never negative.
        scale: ``"learned"``: one number a layer, that starts at the first batch with the least squared error;
            estimators see the input in units of it. ``"xnor"``: the mean size of what each output sees, not
            learned. None: nothing. Codes of 0 and 1 always have one number a layer, which decides about
            their threshold, and is not learned unless ``"learned"``.
        has_threshold: whether each input channel has a learned threshold instead of 0, as in ReActNet.
        estimator: None: that of the weights, and Bi-Real's on normalised inputs for BiPer, as its paper does.

    Raises:
        ValueError: for values out of range.
    """

    bits: int = 1
    scale: InputScale | None = "learned"
    has_threshold: bool = False
    estimator: str | Estimator | None = None

    def __post_init__(self) -> None:
        if self.bits not in (1, 32):
            raise ValueError(f"Activations: bits must be 1 or 32, got {self.bits!r}.")
        if self.scale is not None and self.scale not in get_args(InputScale):
            raise ValueError(
                f"Activations: unknown scale {self.scale!r}. {nearest(self.scale, get_args(InputScale))}"
            )

    @classmethod
    def of(cls, activations: int | Activations) -> Activations:
        """The form itself, or that of bits alone."""
        return activations if isinstance(activations, Activations) else cls(bits=activations)
