"""What estimators share: the sign, the two ways to give it a gradient, the module and its registry.

All obey ``sign(0) = sign(-0.0) = +1``. What is not a number counts as not negative, so +1, as it does where
codes are packed into bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_nas.registry import Registry

__all__ = [
    "Estimator",
    "check_positive",
    "estimator_named",
    "estimators",
    "sign",
    "straight_through",
    "wide",
    "with_slope",
]


def sign(x: Tensor) -> Tensor:
    """-1 where ``x < 0``, else +1; same shape and dtype, no gradient."""
    return torch.where(x.detach() < 0, -1.0, 1.0).to(x.dtype)


def straight_through(x: Tensor, codes: Tensor, slope: Tensor | None) -> Tensor:
    """``codes`` forward; backward, the gradient that arrives times a ``slope`` that is taken to be constant.

    Args:
        x: any shape.
        codes: what is returned, same shape.
        slope: same shape, numbers or a mask, all that is kept for the backward pass; None for 1.
    """
    result = _Constant.apply(x, codes.detach(), None if slope is None else slope.detach())
    return cast(Tensor, result)


def with_slope(x: Tensor, codes: Tensor, slope: Callable[[Tensor], Tensor], *settings: Tensor) -> Tensor:
    """``codes`` forward; backward, the gradient that arrives times ``slope(x)``.

    Only ``x`` is kept, and the slope is not computed before the backward pass. Second derivatives are those
    of the function whose derivative the slope is.

    Args:
        x: any shape.
        codes: what is returned, same shape and dtype.
        slope: of ``x``, same shape and dtype; made of differentiable operations.
        settings: tensors that ``slope`` reads, so that a change between the passes is refused.

    Raises:
        RuntimeError: in the backward pass, if ``x`` or a setting was changed in place after the forward.
    """
    return cast(Tensor, _Sloped.apply(x, codes.detach(), slope, *settings))


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, slope: Tensor | None) -> Tensor:
        ctx.has_slope = slope is not None
        if slope is not None:
            ctx.save_for_backward(slope)
        return codes.clone()  # an input may not be returned as it is

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (gradient * ctx.saved_tensors[0] if ctx.has_slope else gradient.clone()), None, None


class _Sloped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, slope: Callable[[Tensor], Tensor], *settings: Tensor
    ) -> Tensor:
        ctx.slope, ctx.others = slope, 2 + len(settings)
        ctx.save_for_backward(x, *settings)  # of settings only their versions matter
        return codes.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0]
        return gradient * ctx.slope(x), *(None,) * ctx.others


class Estimator(nn.Module):
    """A module whose forward gives -1 and +1, and whose backward is the rule of its class.

    A subclass gives :meth:`surrogate` and :meth:`slope`, and :meth:`schedule` where its rule changes with the
    progress of training. What changes is kept in buffers of zero dimensions, outside of the state dict: a
    compiled graph is not built anew, and checkpoints of float networks still fit.
    """

    @property
    def is_binary(self) -> bool:
        """Whether the forward now gives -1 and +1 alone."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Codes of the shape and dtype of ``x``."""
        return with_slope(x, sign(x), self.slope, *self.buffers())

    def surrogate(self, x: Tensor) -> Tensor:
        """The function whose derivative stands in for that of the sign."""
        raise NotImplementedError

    def slope(self, x: Tensor) -> Tensor:
        """Its derivative at ``x``, same shape and dtype."""
        raise NotImplementedError

    def schedule(self, progress: float) -> None:
        """Set what changes over a run; not between a forward and its backward pass.

        Args:
            progress: done of the run, in [0, 1].

        Raises:
            ValueError: if it is out of range.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"{type(self).__name__}.schedule: progress must be in [0, 1], got {progress}.")

    def _state(self, **values: float) -> None:
        """Keep numbers that change, or that a compiled graph should not be built around."""
        for name, value in values.items():
            self.register_buffer(name, torch.tensor(float(value)), persistent=False)


estimators: Registry[type[Estimator]] = Registry("estimator")


def estimator_named(estimator: str | Estimator) -> Estimator:
    """The estimator of a registered name, or the one given.

    Raises:
        ValueError: for an unknown name; lists the known ones.
        TypeError: for what is neither.
    """
    if isinstance(estimator, str):
        return estimators[estimator]()
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"An estimator is a registered name ({', '.join(estimators)}) or an instance such as "
            f"ReSTE(power=3.0), got {estimator!r}."
        )
    return estimator


def check_positive(owner: str, **values: float) -> None:
    """Refuse a setting that is not a finite number above 0."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{owner}: {name} must be a number above 0, got {value}.")


def wide(x: Tensor) -> Tensor:
    """At least float32: half precision loses the phase of a sine and the slope near 0."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
