"""The memory that a subnetwork takes while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_nas.costs.bytes import Bytes
from lightning_nas.costs.cost import Once, costs
from lightning_nas.costs.tracing import traced
from lightning_nas.space import Value
from lightning_nas.supernet import Supernet

__all__ = ["PeakMemory"]


@costs.register("peak_memory")
class PeakMemory:
    """Bytes of the weights, and the most that inputs and activations take at one time in a forward pass.

    Exactly what eager PyTorch allocates for tensors without gradients: one counts from the operation that
    makes it until nothing refers to it, so a residual branch keeps its input alive. Scratch space inside a
    kernel and the allocator's rounding are not seen. Nothing is measured: the network runs on tensors without
    data, which takes a fraction of a second an architecture.

    Args:
        supernet: whose architectures are counted.
        example_inputs: what the network is called with: a tensor, a tuple, or a dict of keywords; all of its
            batch is counted.
    """

    name, unit = "peak_memory", "B"

    def __init__(self, supernet: Supernet, example_inputs: Any) -> None:
        self.supernet, self.example_inputs = supernet, example_inputs
        self._weights = Bytes(supernet)
        self._activations = Once(supernet, lambda a: traced(supernet, a, example_inputs).peak_bytes)

    def __repr__(self) -> str:
        return f"PeakMemory({type(self.supernet.model).__name__})"

    def __call__(self, architecture: Mapping[str, Value]) -> int:
        """Bytes of one architecture."""
        return self._weights(architecture) + self._activations(architecture)
