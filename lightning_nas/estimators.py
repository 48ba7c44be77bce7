"""Gradient estimators: a forward of exactly -1 and +1, and a named rule for its backward pass.

Each is a slope ``s(x)``: the gradient of ``q(x)`` with respect to ``x`` is taken to be ``s(x)``, which is the
derivative of a surrogate ``f``. All of them obey ``sign(0) = sign(-0.0) = +1``; what is not a number counts
as not negative, so +1, as it does where codes are packed into bits.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

from lightning_nas.registry import Registry

__all__ = [
    "DSQ",
    "EDE",
    "STE",
    "BiPer",
    "BiReal",
    "Elastic",
    "Estimator",
    "Identity",
    "ReSTE",
    "elastic_codes",
    "estimating_error",
    "estimator_named",
    "estimators",
    "gradient_stability",
    "scale_gradient",
    "sign",
    "sine_penalty",
    "straight_through",
]


def sign(x: Tensor) -> Tensor:
    """-1 where ``x < 0``, else +1; same shape and dtype, no gradient."""
    return torch.where(x.detach() < 0, -1.0, 1.0).to(x.dtype)


def straight_through(x: Tensor, codes: Tensor, slope: Tensor | None) -> Tensor:
    """``codes`` forward; backward, the gradient that arrives times ``slope``, to ``x``.

    Args:
        x: any shape.
        codes: what is returned, same shape.
        slope: same shape, numbers or a mask; None for a slope of 1.

    Raises:
        RuntimeError: on a second backward pass through the first: the rule has no derivative.
    """
    result = _StraightThrough.apply(x, codes.detach(), None if slope is None else slope.detach())
    return cast(Tensor, result)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, slope: Tensor | None) -> Tensor:
        ctx.has_slope = slope is not None
        if slope is not None:
            ctx.save_for_backward(slope)
        return codes.clone()  # an input may not be returned as it is

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (gradient * ctx.saved_tensors[0] if ctx.has_slope else gradient.clone()), None, None


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
        return straight_through(x, sign(x), self.slope(x.detach()))

    def surrogate(self, x: Tensor) -> Tensor:
        """The function whose derivative stands in for that of the sign."""
        raise NotImplementedError

    def slope(self, x: Tensor) -> Tensor | None:
        """Its derivative at ``x``, same shape; None for 1 everywhere."""
        raise NotImplementedError

    def schedule(self, progress: float) -> None:
        """Set what changes over a run.

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


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{owner}: {name} must be a number above 0, got {value}.")


def _wide(x: Tensor) -> Tensor:
    """At least float32: half precision loses the phase of a sine and the slope near 0."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@estimators.register("ste")
class STE(Estimator):
    """The straight-through estimator: ``s(x) = 1`` where ``|x| <= clip``, else 0.

    Args:
        clip: where gradients end, the edge included; None: nowhere (identity).

    Raises:
        ValueError: if ``clip`` is not above 0.

    Example:
        >>> x = torch.tensor([-2.0, 0.0, 0.5], requires_grad=True)
        >>> STE()(x).tolist()
        [-1.0, 1.0, 1.0]

    Reference: Hubara et al., Binarized Neural Networks, NeurIPS 2016, section 1.3.
    """

    def __init__(self, clip: float | None = 1.0) -> None:
        super().__init__()
        if clip is not None:
            _positive("STE", clip=clip)
        self.clip = clip

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    @override
    def slope(self, x: Tensor) -> Tensor | None:
        return None if self.clip is None else x.abs() <= self.clip

    @override
    def extra_repr(self) -> str:
        return f"clip={self.clip}"


@estimators.register("identity")
class Identity(STE):
    """The straight-through estimator without an end: ``s(x) = 1``.

    Reference: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013.
    """

    def __init__(self) -> None:
        super().__init__(clip=None)

    @override
    def extra_repr(self) -> str:
        return ""


@estimators.register("bireal")
class BiReal(Estimator):
    """The piecewise parabola of Bi-Real Net: ``s(x) = max(0, 2 - 2|x|)``.

    Args:
        normalize: divide each example by the standard deviation of its entries while training, as ReCU and
            BiPer do with activations; the sign is the same.

    Reference: Liu et al., Bi-Real Net, ECCV 2018, section 3.3; Xu et al., ReCU, ICCV 2021 (normalisation).
    """

    def __init__(self, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.normalize and self.training:
            variance = _wide(x).flatten(1).var(1, unbiased=True).view(-1, *(1,) * (x.ndim - 1))
            x = (x * torch.rsqrt(variance + 1e-5)).to(x.dtype)
        return super().forward(x)

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        x = x.clamp(-1, 1)
        return 2 * x - x * x.abs()

    @override
    def slope(self, x: Tensor) -> Tensor:
        return (2 - 2 * x.abs()).clamp(min=0)

    @override
    def extra_repr(self) -> str:
        return f"normalize={self.normalize}" if self.normalize else ""


@estimators.register("ede")
class EDE(Estimator):
    """The error decay estimator of IR-Net: ``s(x) = k t (1 - tanh(t x)^2)``.

    Its schedule raises ``t`` from ``start`` to ``end``, evenly in its logarithm, with ``k = max(1 / t, 1)``:
    from nearly the identity to nearly the sign.

    Args:
        t: steepness until a schedule sets it.
        k: height; None: ``max(1 / t, 1)``.
        start: of the schedule.
        end: of the schedule.

    Raises:
        ValueError: if one is not above 0.

    Reference: Qin et al., IR-Net, CVPR 2020, section 3.3, eq. 11 to 13.
    """

    t: Tensor
    k: Tensor

    def __init__(self, t: float = 1.0, k: float | None = None, start: float = 0.1, end: float = 10.0) -> None:
        super().__init__()
        _positive("EDE", t=t, start=start, end=end, k=1.0 if k is None else k)
        self.start, self.end = start, end
        self._state(t=t, k=max(1 / t, 1.0) if k is None else k)

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        return self.k * torch.tanh(self.t * _wide(x))

    @override
    def slope(self, x: Tensor) -> Tensor:
        return (self.k * self.t * (1 - torch.tanh(self.t * _wide(x)).square())).to(x.dtype)

    @override
    def schedule(self, progress: float) -> None:
        super().schedule(progress)
        t = self.start ** (1 - progress) * self.end**progress
        self.t.fill_(t)
        self.k.fill_(max(1 / t, 1.0))

    @override
    def extra_repr(self) -> str:
        return f"t={self.t.item():.4g}, k={self.k.item():.4g}, start={self.start}, end={self.end}"


@estimators.register("dsq")
class DSQ(Estimator):
    """Differentiable soft quantization with one bit: ``s(x) = S k (1 - tanh(k x)^2)`` where ``|x| <= clip``.

    ``S = 1 / (1 - alpha)`` and ``k = atanh(1 - alpha) / clip``, so that the soft function reaches -1 and +1
    at the ends of the range. Range and ``alpha`` are fixed here.

    Args:
        alpha: how far from a step the soft function is, in (0, 1).
        clip: half the range.

    Raises:
        ValueError: if one is out of range.

    Reference: Gong et al., Differentiable Soft Quantization, ICCV 2019, section 3.1.
    """

    def __init__(self, alpha: float = 0.2, clip: float = 1.0) -> None:
        super().__init__()
        _positive("DSQ", clip=clip)
        if not 0 < alpha < 1:
            raise ValueError(f"DSQ: alpha must be in (0, 1), got {alpha}.")
        self.alpha, self.clip = alpha, clip
        self._height, self._steepness = 1 / (1 - alpha), math.atanh(1 - alpha) / clip

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        return self._height * torch.tanh(self._steepness * x.clamp(-self.clip, self.clip))

    @override
    def slope(self, x: Tensor) -> Tensor:
        rise = self._height * self._steepness * (1 - torch.tanh(self._steepness * _wide(x)).square())
        return torch.where(x.abs() <= self.clip, rise, 0.0).to(x.dtype)

    @override
    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, clip={self.clip}"


@estimators.register("reste")
class ReSTE(Estimator):
    """The rectified straight-through estimator: ``f(x) = sign(x) |x|^(1 / power)``.

    ``s(x) = |x|^((1 - power) / power) / power`` where ``chord < |x| <= clip``; within the chord the slope of
    the line from ``f(-chord)`` to ``f(chord)``; 0 beyond the clip. A power of 1 is the clipped
    straight-through estimator, a large one the sign itself. The schedule goes from 1 to ``power``, slowly
    first: ``1 + (1 - cos(pi progress / 2)) (power - 1)``.

    Args:
        power: of the root, at least 1; the end of the schedule, and in force until one is set.
        clip: beyond it there is no gradient.
        chord: half the band around 0 in which the slope is constant, below ``clip``.

    Raises:
        ValueError: if one is out of range.

    Reference: Wu et al., Estimator Meets Equilibrium Perspective, ICCV 2023, section 4.2.
    """

    current: Tensor  # the power in force

    def __init__(self, power: float = 3.0, clip: float = 1.5, chord: float = 0.1) -> None:
        super().__init__()
        _positive("ReSTE", clip=clip, chord=chord)
        if not (power >= 1 and math.isfinite(power)):
            raise ValueError(f"ReSTE: power must be at least 1, got {power}.")
        if chord >= clip:
            raise ValueError(f"ReSTE: chord must be below clip, got {chord} and {clip}.")
        self.power, self.clip, self.chord = power, clip, chord
        self._state(current=power)

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        size, sides = _wide(x).abs().clamp(max=self.clip), sign(x)
        root = size.clamp(min=self.chord) ** (1 / self.current)
        line = size * self.chord ** (1 / self.current - 1)
        return sides * torch.where(size <= self.chord, line, root)

    @override
    def slope(self, x: Tensor) -> Tensor:
        size, exponent = _wide(x).abs(), 1 / self.current - 1
        rise = size.clamp(min=self.chord) ** exponent  # at least chord: no 0 to a negative power
        rise = torch.where(size <= self.chord, rise, rise / self.current)
        return torch.where(size <= self.clip, rise, 0.0).to(x.dtype)

    @override
    def schedule(self, progress: float) -> None:
        super().schedule(progress)
        self.current.fill_(1 + (1 - math.cos(math.pi * progress / 2)) * (self.power - 1))

    @override
    def extra_repr(self) -> str:
        return f"power={self.power}, clip={self.clip}, chord={self.chord}"


@estimators.register("biper")
class BiPer(Estimator):
    """Binary periodic function, for weights: the square wave ``sign(sin(frequency x))``.

    ``s(x) = frequency cos(frequency x)``. In its first stage the sine itself is the forward, so that the
    network is not binary yet; its schedule leaves the stages to whoever trains.

    Args:
        frequency: of the wave, in radians per unit of ``x``.
        stage: 1 for the sine, 2 for the square wave.

    Raises:
        ValueError: for a frequency that is not above 0, or another stage.

    Reference: Vargas et al., BiPer, CVPR 2024, section 3.
    """

    def __init__(self, frequency: float = 20.0, stage: int = 2) -> None:
        super().__init__()
        _positive("BiPer", frequency=frequency)
        if stage not in (1, 2):
            raise ValueError(f"BiPer: stage must be 1 (the sine) or 2 (the square wave), got {stage}.")
        self.frequency, self.stage = frequency, stage

    @property
    @override
    def is_binary(self) -> bool:
        return self.stage == 2

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.stage == 1:
            return self.surrogate(x).to(x.dtype)
        return straight_through(x, sign(self.surrogate(x)).to(x.dtype), self.slope(x.detach()))

    @override
    def surrogate(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * _wide(x))

    @override
    def slope(self, x: Tensor) -> Tensor:
        return (self.frequency * torch.cos(self.frequency * _wide(x))).to(x.dtype)

    @override
    def extra_repr(self) -> str:
        return f"frequency={self.frequency}, stage={self.stage}"


def sine_penalty(weight: Tensor, frequency: float = 20.0) -> Tensor:
    """``mean(sin(frequency w)^2)``: BiPer's penalty for one layer, a scalar in [0, 1].

    Reference: Vargas et al., BiPer, CVPR 2024, section 3.3.
    """
    return torch.sin(frequency * _wide(weight)).square().mean()


# --- codes with a learned scale


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` forward; backward, the gradient times a factor."""
    return x.detach() + (x - x.detach()) * factor


def elastic_codes(x: Tensor, scale: Tensor, levels: tuple[int, ...] = (-1, 1)) -> Tensor:
    """The codes that a learned scale rounds to, so that ``scale * codes`` has the gradients of the method.

    With ``v = x / scale``: the levels (-1, 1) are ``sign(x)``; (0, 1) and (-1, 0, 1) are ``round(v)``, ties
    to even, within the levels. Of ``y = scale * codes`` the gradient to ``x`` is 1 within the levels and 0
    outside; that to ``scale`` is the code outside, ``round(v) - v`` inside, and the code for (-1, 1).

    Args:
        x: any shape.
        scale: above 0, broadcasts against ``x``.
        levels: one of the three.

    Reference: Liu et al., BiT, NeurIPS 2022, section 3.2; Esser et al., LSQ, ICLR 2020.
    """
    low, high = levels[0], levels[-1]
    wide = _wide(x)
    ratio = wide / scale.clamp(min=1e-5)
    inside = (ratio.detach() >= low) & (ratio.detach() <= high)
    if levels == (-1, 1):
        return straight_through(wide / scale.detach().clamp(min=1e-5), sign(wide), inside).to(x.dtype)
    codes = ratio.detach().round().clamp(low, high)
    return straight_through(ratio, codes, inside).to(x.dtype)


class Elastic(nn.Module):
    """Codes of one bit with a learned scale and, if wanted, a learned shift for each channel.

    The module gives codes; whoever uses them multiplies with :attr:`scale` after the integer product. The
    scale starts at the first batch in training mode: twice the mean size of the entries, or four times it for
    codes of 0 and 1.

    Args:
        signed: codes -1 and +1; else 0 and 1, for what is never negative.
        channels: length of the last dimension, for a shift that is added first; None: no shift.

    Reference: Liu et al., BiT, NeurIPS 2022, section 3.2.
    """

    is_started: Tensor

    def __init__(self, signed: bool = True, channels: int | None = None) -> None:
        super().__init__()
        self.signed, self.levels = signed, ((-1, 1) if signed else (0, 1))
        self.size = nn.Parameter(torch.ones(()))
        self.shift = None if channels is None else nn.Parameter(torch.zeros(channels))
        self.register_buffer("is_started", torch.tensor(False))
        self._factor = 1.0  # of the scale's gradient, by the size of the last input
        self._may_start = True  # a flag of Python's, so that no step waits for the device

    @property
    def scale(self) -> Tensor:
        """What codes are to be multiplied with, a scalar above 0."""
        return scale_gradient(self.size, self._factor).clamp(min=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Codes of the shape and dtype of ``x``."""
        if self.shift is not None:
            x = x + self.shift.to(x.dtype)
        if self.training and self._may_start:
            self._start(x.detach())
        self._factor = 1 / math.sqrt(x.numel())
        return elastic_codes(x, self.scale, self.levels)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        first = _wide(x).abs().mean() * (2.0 if self.signed else 4.0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(first)  # each process sees another batch
            first /= torch.distributed.get_world_size()
        self.size.copy_(torch.where(self.is_started, self.size, first.clamp(min=1e-5)))
        self.is_started.fill_(True)
        self._may_start = False

    @override
    def extra_repr(self) -> str:
        return f"signed={self.signed}"


# --- indicators


def estimating_error(weight: Tensor, estimator: Estimator) -> Tensor:
    """How far the surrogate is from the sign at the weights of a layer: ``|| f(w) - sign(w) ||_2``, a scalar.

    Reference: Wu et al., ICCV 2023, section 3, eq. 4.
    """
    with torch.no_grad():
        surrogate = estimator.surrogate(weight)
        codes = sign(surrogate) if isinstance(estimator, BiPer) else sign(weight)
        error: Tensor = torch.linalg.vector_norm(surrogate - codes)
        return error


def gradient_stability(gradient: Tensor) -> Tensor:
    """The unbiased variance of the sizes of a layer's gradients, a scalar: large means unstable.

    Reference: Wu et al., ICCV 2023, section 3, eq. 5.
    """
    return gradient.detach().abs().var()
