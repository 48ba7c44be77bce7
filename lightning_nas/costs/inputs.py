"""Example inputs: how a network is called with them, their batch, and their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["arguments", "batch_of", "call", "shapes_of"]


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a tensor, a tuple of arguments or a mapping of keywords is to a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def call(network: nn.Module, inputs: Any) -> Any:
    """The network's output for its inputs."""
    args, keywords = arguments(inputs)
    return network(*args, **keywords)


def batch_of(example_inputs: Any, size: int) -> Any:
    """The example as a batch of ``size``: as it is if it has that many samples, else its first one repeated.

    A tensor that is as long as the first one belongs to the batch; others stay as they are.

    Raises:
        ValueError: if there is no tensor with a first dimension, or it is on the meta device, without values.
    """
    tensors = [t for t in tree_leaves(example_inputs) if isinstance(t, Tensor) and t.ndim]
    if not tensors or any(t.is_meta for t in tensors):
        got = "tensors on the meta device" if tensors else repr(example_inputs)
        raise ValueError(
            f"example_inputs must hold tensors with values, as the network is called with them, got {got}. "
            "Give for example torch.zeros(1, 3, 224, 224)."
        )
    samples = len(tensors[0])

    def resized(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == samples != size:
            return value[:1].expand(size, *value.shape[1:]).contiguous()
        return value

    return tree_map(resized, example_inputs)


def shapes_of(inputs: Any) -> list[list[int]]:
    """The shapes of all tensors, in order, as JSON can write them."""
    return [list(t.shape) for t in tree_leaves(inputs) if isinstance(t, Tensor)]
