"""Layers that compute with codes: the class of a layer is swapped for a subclass that codes what it takes.

What every layer computes, in this order: ``linear(codes(x), codes(w)) * scale * input_scale + bias``. The
product is a sum of integers where both are codes, and is computed exactly, in float32 at least and outside of
autocast; the scales follow. That order is a promise: execution on packed bits gives the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_nas.binary.forms import Activations, Weights
from lightning_nas.binary.products import outside_autocast
from lightning_nas.binary.scales import least_squares_scale, mean_magnitude, power_of_two, window_magnitude
from lightning_nas.estimators import (
    BiPer,
    BiReal,
    Estimator,
    elastic_codes,
    estimator_named,
    scale_gradient,
    straight_through,
)

__all__ = ["BinaryConv1d", "BinaryConv2d", "BinaryEmbedding", "BinaryLayer", "BinaryLinear"]

_UNKNOWN, _SIGNED, _UNSIGNED = 0, 1, 2  # what the inputs of a layer are, as `input_kind` says it
_FORMS = ("weights", "activations", "weight_bits", "input_bits", "_kind")
_ESTIMATORS = ("weight_estimator", "input_estimator")
_OF_WEIGHTS, _OF_INPUTS = ("weight_scale",), ("input_scale", "input_threshold", "input_kind")


class BinaryLayer(nn.Module):
    """What binary layers have in common.

    Attributes:
        weight: the latent weights, real numbers; name and shape are those of the plain layer.
        weights: how they are coded.
        activations: how inputs are coded.
        weight_bits: 1, 2 or 32, in force now; see :func:`~lightning_nas.binary.set_bits`.
        input_bits: 1 or 32, in force now.
        weight_estimator: the rule of the weights' gradient.
        input_estimator: of the inputs'; None where they stay real.
        weight_scale: learned, ``(out,)``, of ``Weights(scale="learned")``.
        input_scale: a number, where inputs are coded.
        input_threshold: ``(in,)``, of ``Activations(has_threshold=True)``.
        float_class: the class of the plain layer.
    """

    float_class: ClassVar[type[nn.Module]]
    channel_dim: ClassVar[int] = -1  # of inputs and outputs, from the end
    weight: Tensor
    input_scale: Tensor
    input_kind: Tensor

    def __init__(
        self,
        *args: Any,
        estimator: str | Estimator = "reste",
        weights: int | Literal["ternary"] | Weights = 1,
        activations: int | Activations = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)  # of the plain layer, the next in line
        self._code(estimator, weights, activations)

    def _code(
        self,
        estimator: str | Estimator,
        weights: int | Literal["ternary"] | Weights,
        activations: int | Activations,
    ) -> None:
        """Make a plain layer binary; its class is this one already."""
        self.weights, self.activations = Weights.of(weights), Activations.of(activations)
        self.weight_bits, self.input_bits = self.weights.bits, self.activations.bits
        self.weight_estimator = self._copied(estimator)
        self.input_estimator: Estimator | None = None
        self._kind = _UNKNOWN  # what `input_kind` says, where no device need be asked
        if self.weights.scale == "learned":
            self.weight_scale = nn.Parameter(self._unit(self._treated().detach()))
        if self.activations.bits == 32:
            return
        inputs = self.activations.estimator
        if inputs is None:
            is_wave = isinstance(self.weight_estimator, BiPer)
            inputs = BiReal(normalize=True) if is_wave else self.weight_estimator
        self.input_estimator = self._copied(inputs)
        one = self.weight.new_ones(())
        if self.activations.scale == "learned":
            self.input_scale = nn.Parameter(one)
        else:
            self.register_buffer("input_scale", one)
        if self.activations.has_threshold:
            self.input_threshold = nn.Parameter(self.weight.new_zeros(self._in_channels()))
        self.register_buffer("input_kind", torch.zeros((), device=self.weight.device))

    def _copied(self, estimator: str | Estimator) -> Estimator:
        own = copy.deepcopy(estimator_named(estimator)).train(self.training)
        return own if self.weight.is_meta else own.to(self.weight.device)

    def _uncode(self) -> None:
        """Give the layer its class back; what was added to it goes."""
        for name in (*_FORMS, *_ESTIMATORS, *_OF_WEIGHTS, *_OF_INPUTS):
            if name in {*self.__dict__, *self._parameters, *self._buffers, *self._modules}:
                delattr(self, name)
        self.__class__ = self.float_class  # type: ignore[assignment]  # a layer's class is what is swapped

    # --- weights

    @property
    def binary_weight(self) -> Tensor:
        """-1 or +1 for each weight, of ternary ones also 0; exact, and with the estimator's gradient."""
        return self._codes_and_scale()[0]

    @property
    def scale(self) -> Tensor:
        """What the product is multiplied with: ``(out,)``, or a scalar for the whole layer."""
        return self._codes_and_scale()[1]

    def _codes_and_scale(self) -> tuple[Tensor, Tensor]:
        treated = self._treated()
        unit = self._unit(treated)
        return self._codes(treated, unit), self._scale(unit)

    def _treated(self) -> Tensor:
        return self.weights.treated(self.weight.contiguous())  # a slice sums in the order of its copy

    def _unit(self, treated: Tensor) -> Tensor:
        """The mean size of the weights, from which scale and thresholds come."""
        unit = mean_magnitude(treated, "layer" if self.weights.scale == "layer" else "channel")
        return unit * 4 / 3 if self.weights.bits == 2 else unit

    def _codes(self, treated: Tensor, unit: Tensor) -> Tensor:
        if self.weights.is_relative or self.weight_bits == 2:
            unit = unit.detach().clamp(min=torch.finfo(unit.dtype).tiny)
            treated = treated / (unit.view(-1, *(1,) * (treated.ndim - 1)) if unit.ndim else unit)
        if self.weight_bits == 2:
            return straight_through(treated, treated.detach().clamp(-1, 1).round(), None)
        codes: Tensor = self.weight_estimator(treated)
        return codes

    def _scale(self, unit: Tensor) -> Tensor:
        if self.weights.scale is None:
            return torch.ones_like(unit)
        if self.weights.scale == "learned":
            return self.weight_scale
        if self.weights.scale == "power_of_two":
            return power_of_two(unit)
        return unit if self.weights.grad_through_scale else unit.detach()

    # --- inputs

    @property
    def input_is_nonnegative(self) -> bool | None:
        """Whether the first batch had no negative input, so that codes are 0 and 1; None: not seen yet."""
        if self.input_estimator is None:
            return None
        kind = self._kind or int(self.input_kind.round())
        return None if kind == _UNKNOWN else kind == _UNSIGNED

    def input_codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The codes of an input, and what a product with them is multiplied with.

        Args:
            x: an input of the layer.

        Returns:
            Codes of the shape of ``x``, in float32 at least, and None, a scalar, or a tensor that broadcasts
            against the output.

        Raises:
            ValueError: at the first batch, if it is not finite.
        """
        assert self.input_estimator is not None  # of inputs that stay real nobody asks
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.activations.has_threshold:
            wide = wide - self._along_channels(self.input_threshold)
        if self._kind_of(wide) == _UNSIGNED:
            scale = self._input_unit(wide)
            return elastic_codes(wide, scale, (0, 1)), scale
        if self.activations.scale == "learned":
            scale = self._input_unit(wide)
            return self.input_estimator(wide / scale.detach()), scale
        codes = self.input_estimator(wide)
        return codes, self._magnitude(wide) if self.activations.scale == "xnor" else None

    def _input_unit(self, x: Tensor) -> Tensor:
        """The scale of the inputs, above 0; its gradient by the root of their number, as LSQ has it."""
        scale = straight_through(self.input_scale, self.input_scale.detach().clamp(min=1e-5), None)
        return scale_gradient(scale, x.numel() ** -0.5)

    def _kind_of(self, x: Tensor) -> int:
        if self._kind == _UNKNOWN:
            self._learn_inputs(x)
        return self._kind

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not type it
    @torch.no_grad()
    def _learn_inputs(self, x: Tensor) -> None:
        """Decide from a first batch between codes of -1 and +1 and of 0 and 1, and set the scale.

        All processes agree: they take the smallest input of all and the mean of their scales.
        """
        if self.input_kind.is_meta or x.is_meta:
            self._kind = _SIGNED
            return
        self._kind = int(self.input_kind.round())  # a copied buffer tells what another network has seen
        if self._kind != _UNKNOWN:
            return
        lowest = torch.where(torch.isfinite(x).all(), x.min(), -torch.inf)
        is_shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        if is_shared:
            torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
        if float(lowest) == -torch.inf:  # on all processes, so that none waits for another
            raise ValueError(
                f"{type(self).__name__}({self.extra_repr()}): the first batch has inputs that are not "
                "finite, and no scale can start from them. Look for the layer before it that makes them."
            )
        kind = _UNSIGNED if float(lowest) >= 0 else _SIGNED
        scale = least_squares_scale(x, kind == _UNSIGNED)
        if is_shared:
            torch.distributed.all_reduce(scale)
            scale /= torch.distributed.get_world_size()
        self.input_scale.copy_(scale)
        self.input_kind.fill_(kind)
        self._kind = kind

    # --- running

    def forward(self, x: Tensor) -> Tensor:
        """What the plain layer returns, computed with codes; of the same shape and dtype."""
        weight, scale = (self.weight, None) if self.weight_bits == 32 else self._codes_and_scale()
        if self.input_bits == 32:
            product = self._product(x, weight)
            return self._scaled(product, scale, None).to(product.dtype)
        codes, input_scale = self.input_codes(x)
        dtype = x.dtype
        if dtype != torch.float64 and torch.amp.is_autocast_available(x.device.type):
            is_cast = torch.is_autocast_enabled(x.device.type)
            dtype = torch.get_autocast_dtype(x.device.type) if is_cast else dtype
        with outside_autocast(x.device):
            product = self._product(codes, weight.to(codes.dtype))
        is_integer = self.weight_bits != 32 and self.weight_estimator.is_binary
        if is_integer and x.device.type != "cpu" and self.channel_dim != -1:
            # fast convolutions (Winograd) transform what they multiply, and miss integers by some rounding
            product = straight_through(product, product.detach().round(), None)
        return self._scaled(product, scale, input_scale).to(dtype)

    def _scaled(self, product: Tensor, scale: Tensor | None, input_scale: Tensor | None) -> Tensor:
        bias: Tensor | None = getattr(self, "bias", None)
        product = product if scale is None else product * self._along_channels(scale)
        product = product if input_scale is None else product * input_scale
        return product if bias is None else product + self._along_channels(bias)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The plain layer's product, without a bias."""
        raise NotImplementedError

    def _magnitude(self, x: Tensor) -> Tensor:
        """The mean size of what each output sees."""
        raise NotImplementedError

    def _in_channels(self) -> int:
        raise NotImplementedError

    def _along_channels(self, values: Tensor) -> Tensor:
        return values.view(-1, *(1,) * (-1 - self.channel_dim)) if values.ndim else values

    # --- state

    @override
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Checkpoints of a plain layer fit: what they lack starts anew, from the weights that they have."""
        for group in (_OF_WEIGHTS, _OF_INPUTS, _ESTIMATORS[:1], _ESTIMATORS[1:]):
            own = {
                name: tensor
                for name, tensor in self.state_dict(prefix=prefix).items()
                if name.removeprefix(prefix).split(".")[0] in group
            }
            weight = state_dict.get(f"{prefix}weight")
            if isinstance(weight, Tensor) and not own.keys() & state_dict.keys():
                state_dict.update(self._anew(own, prefix, weight))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.input_estimator is not None:
            self._kind = _UNKNOWN  # whatever was loaded is read at the next batch

    def _anew(self, own: Mapping[str, Tensor], prefix: str, weight: Tensor) -> dict[str, Tensor]:
        starts = {name: tensor.detach().clone() for name, tensor in own.items()}
        if f"{prefix}weight_scale" in own:
            starts[f"{prefix}weight_scale"] = self._unit(self.weights.treated(weight.detach()))
        if f"{prefix}input_kind" in own:
            starts[f"{prefix}input_kind"] = torch.zeros_like(own[f"{prefix}input_kind"])
        return starts

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, input_bits={self.input_bits}"


class BinaryLinear(BinaryLayer, nn.Linear):
    """A linear layer of codes: ``linear(codes(x), codes(W)) * scale * input_scale + bias``.

    Takes the arguments of :class:`torch.nn.Linear`, and:

    Example:
        >>> layer = BinaryLinear(64, 8, activations=1)
        >>> layer(torch.randn(2, 64)).shape, layer.binary_weight.unique().tolist()
        (torch.Size([2, 8]), [-1.0, 1.0])

    Args:
        estimator: the rule of the weights' gradient, a name or an instance, which is copied.
        weights: how weights are coded, or bits alone.
        activations: how inputs are coded, or bits alone.

    Raises:
        ValueError: for an unknown estimator.
    """

    float_class = nn.Linear

    @override
    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    @override
    def _magnitude(self, x: Tensor) -> Tensor:
        return x.detach().abs().mean(-1, keepdim=True)

    @override
    def _in_channels(self) -> int:
        return int(self.weight.shape[1])


class _BinaryConv(BinaryLayer):
    """What convolutions have in common; zero padding pads codes with 0, as training code does."""

    groups: int
    kernel_size: tuple[int, ...]

    @override
    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        product: Tensor = self._conv_forward(x, weight, None)  # type: ignore[operator]  # of torch's layer
        return product

    @override
    def _magnitude(self, x: Tensor) -> Tensor:
        layer: Any = self
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        geometry = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation}
        return window_magnitude(x, self.kernel_size, **geometry)

    @override
    def _in_channels(self) -> int:
        return int(self.weight.shape[1]) * self.groups


class BinaryConv1d(_BinaryConv, nn.Conv1d):
    """A convolution of codes; see :class:`BinaryConv2d`."""

    float_class = nn.Conv1d
    channel_dim = -2


class BinaryConv2d(_BinaryConv, nn.Conv2d):
    """A convolution of codes: ``conv(codes(x), codes(W)) * scale * input_scale + bias``.

    Zero padding is of the codes: a padded place is 0, neither -1 nor +1. Takes the arguments of
    :class:`torch.nn.Conv2d`, and those of :class:`BinaryLinear`.
    """

    float_class = nn.Conv2d
    channel_dim = -3


class BinaryEmbedding(BinaryLayer, nn.Embedding):
    """A table of codes, each row with a scale of its own: ``codes(W)[i] * scale[i]``.

    Only the rows that are looked up are coded. Takes the arguments of :class:`torch.nn.Embedding`, and those
    of :class:`BinaryLinear`; of activations there are none.
    """

    float_class = nn.Embedding

    @override
    def forward(self, x: Tensor) -> Tensor:
        rows = nn.Embedding.forward(self, x)
        if self.weight_bits == 32:
            return rows
        treated = self.weights.treated(rows.reshape(-1, rows.shape[-1]))
        unit = self._unit(treated)
        scale = self._scale(unit)
        if self.weights.scale == "learned":
            scale = self.weight_scale[x.flatten()]
        return (self._codes(treated, unit) * scale[:, None]).view_as(rows)

    @override
    def _code(self, estimator: Any, weights: Any, activations: Any) -> None:
        if Activations.of(activations).bits != 32:
            raise ValueError(f"BinaryEmbedding: it has no activations to code, got {activations=}.")
        super()._code(estimator, weights, activations)

    @override
    def _unit(self, treated: Tensor) -> Tensor:
        unit = mean_magnitude(treated)
        return unit * 4 / 3 if self.weights.bits == 2 else unit
