"""Whole networks: which layers become binary and why, the swap in place, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_nas.binary.forms import Activations, Weights
from lightning_nas.binary.layers import BinaryConv1d, BinaryConv2d, BinaryEmbedding, BinaryLayer, BinaryLinear
from lightning_nas.errors import NASError, NoMatchError, UnsupportedError
from lightning_nas.estimators import Estimator, estimator_named
from lightning_nas.registry import nearest
from lightning_nas.supernet.layers import Elastic

__all__ = ["Plan", "binarize", "calibrate", "layers", "plan", "release", "report", "set_bits"]

_BINARY: dict[type[nn.Module], type[BinaryLayer]] = {
    cls.float_class: cls for cls in (BinaryLinear, BinaryConv1d, BinaryConv2d, BinaryEmbedding)
}
_SHORTCUTS = ("downsample", "shortcut")  # parts of names


@dataclass(frozen=True)
class Plan:
    """Which layers of a network become binary.

    Args:
        binary: their names, in the network's order.
        real: every other layer with a matrix of weights, and why it stays as it is.
    """

    binary: tuple[str, ...]
    real: Mapping[str, str]

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, why in self.real.items():
            reasons.setdefault(why, []).append(name)
        stay = "; ".join(f"{_listed(names)} ({why})" for why, names in reasons.items())
        return f"{len(self.binary)} layers binary: {_listed(self.binary)}. Real: {stay or 'none'}."


def plan(
    model: nn.Module,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = None,
    example_inputs: Any = None,
) -> Plan:
    """Which layers :func:`binarize` would make binary, and why the others not; changes nothing.

    Args:
        model: the network.
        include: as in :func:`binarize`.
        exclude: as in :func:`binarize`.
        example_inputs: as in :func:`binarize`; with them first and last are those that run first and last,
            and layers that are not called stay real.

    Raises:
        NASError: for a network that is elastic already.
        NoMatchError: for a pattern that matches nothing.
        UnsupportedError: for a pattern that matches only what cannot be binary, or where no layer is left.
        ValueError: for weights that are not finite.
    """
    if any(isinstance(module, Elastic) for module in model.modules()):
        raise NASError(
            f"binarize: this {type(model).__name__} has a supernet already. Call supernet.release(), "
            "binarize it, and make the supernet then: Supernet(binarize(model))."
        )
    modules = {name: module for name, module in model.named_modules() if name}
    weighted = {name: module for name, module in modules.items() if _is_weighted(module)}
    called = None if example_inputs is None else _called(model, weighted, example_inputs)
    reasons = _defaults(model, weighted, called)
    if include is not None:
        asked = {name for pattern in _patterns(include) for name in _asked(pattern, modules, called)}
        for name in weighted:
            if name in asked:
                reasons.pop(name, None)
            else:
                reasons.setdefault(name, "not included")
    for pattern in _patterns(exclude):
        excluded = [name for name in weighted if _matches(name, pattern)]
        if not excluded:
            raise NoMatchError(
                f"binarize: exclude pattern {pattern!r} matches no layer with weights. "
                f"{_nearest(pattern, weighted)}"
            )
        reasons.update(dict.fromkeys(excluded, "excluded"))
    chosen = tuple(name for name in weighted if name not in reasons)
    if not chosen:
        listed = (
            "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "it has no layer with weights"
        )
        raise UnsupportedError(
            f"binarize: no layer of this {type(model).__name__} is left to be binary ({listed}). Name layers "
            "with include=."
        )
    for name in chosen:
        weight = weighted[name]._parameters["weight"]
        if weight is not None and not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"binarize: {name}.weight has {int((~torch.isfinite(weight)).sum())} values that are not "
                "finite, and they have no sign. Load sound weights first, or leave it out with exclude=."
            )
    return Plan(chosen, reasons)


def binarize(
    model: nn.Module,
    estimator: str | Estimator = "reste",
    *,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = None,
    weights: int | Literal["ternary"] | Weights = 1,
    activations: int | Activations = 32,
    example_inputs: Any = None,
) -> nn.Module:
    """Make layers of a network binary, in place: linear layers, convolutions and, where asked, embeddings.

    The latent weights are the parameters that were there: names, identity and shapes stay, so optimizers and
    checkpoints of the plain network stay valid. Only what is learned besides (scales) is new; call this
    before an optimizer is built.

    Real stay, unless ``include`` names them: the first and the last layer, embeddings, depthwise
    convolutions, and 1 x 1 convolutions of shortcuts (stride above 1, or ``downsample`` or ``shortcut`` in
    their name). :func:`plan` tells which and why, :func:`report` what became of it.

    Inputs that are coded become -1 and +1, or 0 and 1 where the first batch has no negative input: behind
    ReLU or softmax a sign would be constant. GELU and SiLU have both signs, and get -1 and +1.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
        >>> layers(binarize(model))["blocks.0.mlp.fc1"].binary_weight.unique().tolist()
        [-1.0, 1.0]

    Args:
        model: the network, or a compiled one.
        estimator: the rule of the gradient: a registered name or an instance; each layer gets a copy.
        include: shell patterns over names of layers, which may leave out how a name begins; None: all that
            can be binary, but those named above.
        exclude: patterns of layers that stay real; comes after ``include``.
        weights: 1, 2 or ``"ternary"``, 32, or a :class:`Weights` that says more.
        activations: 1, 32, or an :class:`Activations` that says more.
        example_inputs: a batch: a tensor, a tuple of arguments, or a dict of keywords. The network runs on it
            twice, in evaluation mode: before, to see which layers are called; after, to :func:`calibrate`
            inputs. None: inputs are calibrated at the first forward pass.

    Returns:
        The model.

    Raises:
        NoMatchError: for a pattern that matches nothing; lists the nearest names.
        UnsupportedError: for a pattern that matches only what cannot be binary, or where no layer is left.
        ValueError: for an unknown estimator, bits out of range, or weights that are not finite.
        NASError: for a network that is elastic already. In all cases nothing has changed.
    """
    weights, activations = Weights.of(weights), Activations.of(activations)
    if weights.bits == activations.bits == 32:
        raise ValueError("binarize: weights and activations of 32 bits leave nothing to be binary.")
    estimator_named(estimator)
    if activations.estimator is not None:
        estimator_named(activations.estimator)
    inside: nn.Module = getattr(model, "_orig_mod", model)
    chosen = plan(inside, include, exclude, example_inputs)
    for name in chosen.binary:
        layer: Any = inside.get_submodule(name)
        layer.__class__ = _BINARY[type(layer)]
        layer._code(estimator, weights, 32 if isinstance(layer, nn.Embedding) else activations)
    if example_inputs is not None and activations.bits == 1:
        try:
            calibrate(inside, example_inputs)
        except BaseException:
            release(inside)
            raise
    return model


def layers(model: nn.Module) -> dict[str, BinaryLayer]:
    """The binary layers of a network by their names, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryLayer)}


def calibrate(model: nn.Module, example_inputs: Any) -> None:
    """Start the scales of coded inputs from one batch, anew: the model runs on it once, in evaluation mode.

    Where several processes are initialised all must call it; they agree on the mean scale. The first forward
    pass does the same for layers that were not calibrated.

    Args:
        model: with binary layers.
        example_inputs: a tensor, a tuple of arguments, or a dict of keywords.

    Raises:
        ValueError: if an input of a layer is not finite.
    """
    for layer in layers(model).values():
        if layer.input_estimator is not None:
            layer.input_kind.zero_()
            layer._kind = 0
    _run(model, example_inputs)


def set_bits(model: nn.Module, *, weights: int | None = None, activations: int | None = None) -> None:
    """Let binary layers run with fewer codes for a while, as schedules in several steps do.

    Args:
        model: with binary layers.
        weights: 32 for the latent weights themselves, or the bits that :func:`binarize` was given; None: as
            they are.
        activations: the same for inputs.

    Raises:
        NASError: if the network has no binary layer.
        ValueError: for other bits, in which case nothing has changed.
    """
    found = layers(model)
    if not found:
        raise NASError(
            f"set_bits: this {type(model).__name__} has no binary layer. Call binarize(model) first."
        )
    for what, bits in (("weights", weights), ("activations", activations)):
        known = {32, *(getattr(layer, what).bits for layer in found.values())}
        if bits is not None and bits not in known:
            raise ValueError(
                f"set_bits: {what} can have {' or '.join(map(str, sorted(known)))} bits here, got {bits!r}. "
                "binarize(model, ...) decides which codes a layer can have."
            )
    for layer in found.values():
        if weights is not None and weights in (32, layer.weights.bits):
            layer.weight_bits = weights
        if activations is not None and activations in (32, layer.activations.bits):
            layer.input_bits = activations


def release(model: nn.Module) -> nn.Module:
    """Give the user the plain network back, with its latent weights; scales and estimators are gone."""
    for layer in layers(model).values():
        layer._uncode()
    return model


def report(model: nn.Module) -> str:
    """What is coded in a network and how: one line a binary layer, and how much of the network they are."""
    found = layers(model)
    lines = [f"{name:{max(map(len, found))}}  {_line(layer)}" for name, layer in found.items()]
    coded = sum(layer.weight.numel() for layer in found.values() if layer.weight_bits != 32)
    total = sum(parameter.numel() for parameter in model.parameters())
    share = f"{len(found)} binary layers with {coded / max(total, 1):.1%} of {total:,} parameters"
    return "\n".join([*lines, share])


def _line(layer: BinaryLayer) -> str:
    weights = {1: "weights -1, +1", 2: "weights -1, 0, +1", 32: "weights real"}[layer.weight_bits]
    if layer.input_bits == 32:
        inputs = "inputs real"
    else:
        inputs = {
            None: "inputs not seen yet",
            False: "inputs -1, +1",
            True: "inputs 0, 1 (never negative in the first batch)",
        }[layer.input_is_nonnegative]
    return f"{weights}; {inputs}"


# --- which layers


def _patterns(patterns: Iterable[str] | str | None) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns or ())


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _nearest(pattern: str, names: Iterable[str]) -> str:
    return f"{nearest(pattern, names)} Patterns are shell-style, and may leave out how a name begins."


def _is_weighted(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim > 1


def _asked(pattern: str, modules: Mapping[str, nn.Module], called: Iterable[str] | None) -> list[str]:
    """The layers that a pattern of ``include`` asks for, of those that can be binary."""
    matched = [name for name in modules if _matches(name, pattern)]
    if not matched:
        weighted = [name for name, module in modules.items() if _is_weighted(module)]
        raise NoMatchError(
            f"binarize: include pattern {pattern!r} matches nothing. {_nearest(pattern, weighted)}"
        )
    refusals = {name: _refusal(name, modules[name], called) for name in matched}
    able = [name for name, why in refusals.items() if why is None]
    if not able:
        name, why = next(iter(refusals.items()))
        inside = any(_is_weighted(child) for child in modules[name].modules())
        hint = (
            f" For the layers inside it: {pattern + '.*'!r}."
            if inside and not _is_weighted(modules[name])
            else ""
        )
        raise UnsupportedError(f"binarize: {pattern!r} matches {name}, which stays real: {why}.{hint}")
    return able


def _refusal(name: str, module: nn.Module, called: Iterable[str] | None) -> str | None:
    """Why a layer cannot be binary; None if it can."""
    if isinstance(module, BinaryLayer):
        return "binary already"
    if type(module) not in _BINARY or not _is_weighted(module):
        kinds = ", ".join(cls.__name__ for cls in _BINARY)
        return f"a {type(module).__module__}.{type(module).__qualname__} cannot be, only {kinds}"
    if getattr(module, "max_norm", None) is not None:
        return "an embedding with max_norm changes its weights as it runs"
    if called is not None and name not in called:
        return "not called with the example inputs (its weights may be used without it)"
    return None


def _defaults(
    model: nn.Module, weighted: Mapping[str, nn.Module], called: Iterable[str] | None
) -> dict[str, str]:
    """Why layers stay real where nothing is asked for."""
    reasons = {}
    order = list(weighted if called is None else called)
    last = {order[-1]} if order else set()
    if callable(classifier := getattr(model, "get_classifier", None)):  # of timm: one layer or a tuple
        heads = classifier()
        last |= {
            name for name, m in weighted.items() if m in (heads if isinstance(heads, tuple) else (heads,))
        }
    for name, module in weighted.items():
        why = _refusal(name, module, called)
        if why is None and order and name == order[0]:
            why = "first layer"
        elif why is None and name in last:
            why = "last layer"
        elif why is None and isinstance(module, nn.Embedding):
            why = "embedding"
        elif why is None and isinstance(module, nn.Conv1d | nn.Conv2d):
            why = _why_real(name, module)
        if why is not None:
            reasons[name] = why
    return reasons


def _why_real(name: str, conv: nn.Conv1d | nn.Conv2d) -> str | None:
    if conv.groups > 1 and conv.groups == conv.in_channels:
        return "depthwise convolution"
    is_shortcut = max(conv.stride) > 1 or any(part in name.lower() for part in _SHORTCUTS)
    return "1 x 1 convolution of a shortcut" if max(conv.kernel_size) == 1 and is_shortcut else None


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names) if len(names) < 5 else f"{names[0]}, {names[1]}, ... {names[-1]}"


# --- running on a batch


def _run(model: nn.Module, example_inputs: Any) -> None:
    """One pass in evaluation mode, without gradients; modes are as they were afterwards."""
    with ExitStack() as after:
        for module in model.modules():
            after.callback(setattr, module, "training", module.training)
        model.eval()
        with torch.no_grad():
            if isinstance(example_inputs, Mapping):
                model(**example_inputs)
            else:
                model(*((example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs))


def _called(model: nn.Module, weighted: Mapping[str, nn.Module], example_inputs: Any) -> list[str]:
    """The layers that a pass calls, in that order."""
    called: dict[str, None] = {}
    with ExitStack() as after:
        for name, module in weighted.items():
            hook = module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
            after.callback(hook.remove)
        _run(model, example_inputs)
    return list(called)
