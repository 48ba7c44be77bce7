"""Binary layers without latent weights, as files have them: bits, scales, and what a layer has besides.

A frozen layer's ``weight`` is its codes, and its ``weight_scale`` what the scale was when it was stored. It
computes what the layer did that it was made from, bit for bit, and cannot be trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_nas.binary.codes import pack, unpack
from lightning_nas.binary.forms import Activations, Weights
from lightning_nas.binary.layers import BinaryConv1d, BinaryConv2d, BinaryEmbedding, BinaryLayer, BinaryLinear
from lightning_nas.binary.transform import layers
from lightning_nas.errors import NASError, UnsupportedError
from lightning_nas.estimators import BiPer, BiReal, Estimator
from lightning_nas.supernet.layers import memo_without_hooks

__all__ = ["coded_layers", "decoded", "encoded", "freeze", "plain_copy"]

_CODES, _SCALE = "weight_codes", "weight_scale"
_INPUTS = ("input_scale", "input_threshold", "input_kind")
_KNOWN = (Estimator.forward, BiReal.forward, BiPer.forward)  # in evaluation signs, or those of a sine


class Frozen(BinaryLayer):
    """What frozen layers have in common."""

    weight_scale: Tensor  # type: ignore[assignment]  # a buffer, of any scale

    def _freeze(self, form: Mapping[str, Any]) -> None:
        """Make a plain layer frozen, its tensors still to be loaded; its class is this one already."""
        inputs = form["inputs"]
        activations = Activations(bits=32)
        if inputs is not None:
            wave = inputs["frequency"]
            activations = Activations(
                1, inputs["scale"], inputs["has_threshold"], "ste" if wave is None else BiPer(wave)
            )
        shape, dtype = form["shape"], getattr(torch, form["dtype"])
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        self._code("ste", Weights(bits=len(form["codes"]) - 1, scale=None), activations)
        self.register_buffer(_SCALE, self.weight.new_empty(() if form["scale"] == "layer" else shape[:1]))
        self.requires_grad_(False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        self._refuse_training()
        return super().forward(x)

    def _refuse_training(self) -> None:
        if self.training or self.weight_bits == 32:
            raise NASError(
                f"{type(self).__name__}({self.extra_repr()}) comes from a file of codes and has no latent "
                "weights, so it can neither be trained nor run with real weights. Train on from the "
                "checkpoint (.ckpt) of its run, which has them. To train only other layers, call eval() on "
                "this one."
            )

    @override
    def _uncode(self) -> None:
        raise NASError(
            f"release: a {type(self).__name__} has only codes, no latent weights that a float network could "
            "run with. The checkpoint (.ckpt) of its run has them."
        )

    @override
    def _treated(self) -> Tensor:
        return self.weight

    @override
    def _unit(self, treated: Tensor) -> Tensor:
        return self.weight_scale

    @override
    def _codes(self, treated: Tensor, unit: Tensor) -> Tensor:
        return treated

    @override
    def _scale(self, unit: Tensor) -> Tensor:
        return self.weight_scale


class FrozenLinear(Frozen, BinaryLinear):  # type: ignore[misc]  # as BinaryLinear
    """A linear layer of stored codes."""


class FrozenConv1d(Frozen, BinaryConv1d):  # type: ignore[misc]  # as BinaryConv1d
    """A convolution of stored codes."""


class FrozenConv2d(Frozen, BinaryConv2d):  # type: ignore[misc]  # as BinaryConv2d
    """A convolution of stored codes."""


class FrozenEmbedding(Frozen, BinaryEmbedding):
    """A table of stored codes."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        self._refuse_training()
        return nn.Embedding.forward(self, x) * F.embedding(x, self.weight_scale[:, None])


_FROZEN: dict[type[nn.Module], type[Frozen]] = {
    cls.float_class: cls for cls in (FrozenLinear, FrozenConv1d, FrozenConv2d, FrozenEmbedding)
}


# --- to a file


def coded_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The form of each binary layer by its name, as plain data; empty for a float network.

    Raises:
        UnsupportedError: for a layer that does not compute with codes now, or with codes that a file cannot
            hold.
        ValueError: for weights or scales that are not finite.
    """
    found = layers(model)
    for name, layer in found.items():
        why = _refusal(layer)
        if why is not None:
            raise UnsupportedError(f"nas.save: {name} {why}")
        for what, tensor in {"weights": layer.weight, "scales": layer.scale}.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"nas.save: {name} has {what} that are not finite, and they have no sign or size. Load "
                    "an earlier checkpoint of the run."
                )
    return {name: _form(layer) for name, layer in found.items()}


def _refusal(layer: BinaryLayer) -> str | None:
    """Why a file of codes would not compute what the layer does now."""
    weights, inputs = layer.weight_estimator, layer.input_estimator
    if layer.float_class not in _FROZEN:
        return f"is a {type(layer).__name__}, which has no form in a file."
    if layer.weights.bits == 32:
        return "has real weights and codes of inputs alone: there is nothing to pack. Keep its checkpoint."
    if (layer.weight_bits, layer.input_bits) != (layer.weights.bits, layer.activations.bits):
        return (
            "runs with real numbers for now, where it will have codes. Call nas.binary.set_bits first, or "
            "save at the end of the schedule."
        )
    if layer.weight_bits == 1 and not weights.is_binary:
        return f"is not binary yet: its estimator is {weights}. Save behind the last stage."
    if inputs is None:
        return None
    if not inputs.is_binary:
        return f"has inputs that are not binary yet: their estimator is {inputs}. Save behind the last stage."
    if type(inputs).forward not in _KNOWN:
        return f"codes its inputs with {inputs}, whose forward is its own: no file can hold that."
    if layer.input_is_nonnegative is None:
        return "has seen no inputs, so their scale is not known. Call nas.binary.calibrate(model, batch)."
    return None


def _form(layer: BinaryLayer) -> dict[str, Any]:
    inputs = None
    if layer.input_estimator is not None:
        estimator = layer.input_estimator
        inputs = {
            "codes": [0, 1] if layer.input_is_nonnegative else [-1, 1],
            "scale": layer.activations.scale,
            "has_threshold": layer.activations.has_threshold,
            "frequency": estimator.frequency if isinstance(estimator, BiPer) else None,
        }
    scale = layer.scale
    return {
        "shape": [*layer.weight.shape],
        "dtype": str(layer.weight.dtype).removeprefix("torch."),
        "codes": [-1, 1] if layer.weight_bits == 1 else [-1, 0, 1],
        "scale": "channel" if scale.ndim else "layer",
        "inputs": inputs,
    }


@torch.no_grad()
def encoded(model: nn.Module) -> dict[str, Tensor]:
    """What a file has of binary layers in the place of their weights: bits, scales, what inputs learned."""
    tensors = {}
    for name, layer in layers(model).items():
        inputs = {part: tensor for part, tensor in layer.state_dict().items() if part in _INPUTS}
        codes = pack(layer.binary_weight, layer.weight_bits == 2)
        for part, tensor in {_CODES: codes, _SCALE: layer.scale, **inputs}.items():
            tensors[f"{name}.{part}"] = tensor.detach().cpu().clone()
    return tensors


def plain_copy(model: nn.Module) -> nn.Module:
    """The float network that a binary one was made from, without hooks; it shares all tensors with it."""
    tensors = [*model.parameters(), *model.buffers()]
    plain = copy.deepcopy(model, {**memo_without_hooks(model), **{id(tensor): tensor for tensor in tensors}})
    for layer in layers(plain).values():
        BinaryLayer._uncode(layer)
    return plain


# --- from a file


def freeze(model: nn.Module, forms: Mapping[str, Mapping[str, Any]]) -> None:
    """Make layers of a float network frozen, in place; :func:`decoded` tensors are then to be loaded.

    Raises:
        ValueError: if a form is damaged, or names a layer that cannot be frozen.
    """
    for name, form in forms.items():
        try:
            layer: Any = model.get_submodule(name)
            layer.__class__ = _FROZEN[type(layer)]
            layer._freeze(form)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{name!r} cannot be a binary layer ({error!r})") from error


def decoded(tensors: Mapping[str, Tensor], forms: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors of a file with codes in the place of their bits.

    Raises:
        ValueError: naming the layer whose bits are missing or are not those of its shape.
    """
    tensors = dict(tensors)
    for name, form in forms.items():
        bits = tensors.pop(f"{name}.{_CODES}", None)
        if bits is None or (bits.ndim == 3) != (len(form["codes"]) == 3):
            raise ValueError(f"{name}.{_CODES} is missing or has another number of planes")
        try:
            codes = unpack(bits, form["shape"], getattr(torch, form["dtype"]))
        except ValueError as error:
            raise ValueError(f"{name}.{_CODES}: {error}") from error
        tensors[f"{name}.weight"] = codes.to(bits.device)
    return tensors
