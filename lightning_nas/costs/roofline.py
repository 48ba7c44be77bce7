"""A bound on the latency of a subnetwork from a description of a device that is not here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_nas.costs.cost import Once
from lightning_nas.costs.inputs import shapes_of
from lightning_nas.costs.tracing import traced
from lightning_nas.space import Architecture, Value
from lightning_nas.supernet import Supernet

__all__ = ["Device", "Roofline"]


@dataclass(frozen=True)
class Device:
    """What a device can do at best, as its data sheet says.

    Args:
        peak_flops: floating-point operations a second, two a multiply-accumulate, of the data type used.
        bandwidth: bytes a second between its memory and its processor.
        overhead: seconds that each operation takes beside that, such as a GPU's launch of a kernel.
        name: for messages and tables.

    Raises:
        ValueError: for a rate that is not positive, or a negative overhead.

    Example:
        >>> Device.from_json(Device(1e12, 5e10, 2e-6, "phone").to_json())
        Device(peak_flops=1000000000000.0, bandwidth=50000000000.0, overhead=2e-06, name='phone')
    """

    peak_flops: float
    bandwidth: float
    overhead: float = 0.0
    name: str = "device"

    def __post_init__(self) -> None:
        for rate in ("peak_flops", "bandwidth"):
            if not getattr(self, rate) > 0:
                raise ValueError(f"Device: {rate} must be positive, got {getattr(self, rate)!r}.")
        if not self.overhead >= 0:
            raise ValueError(f"Device: overhead must be 0 or more seconds, got {self.overhead!r}.")

    def to_json(self) -> str:
        """The description as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Device:
        """Read what :meth:`to_json` wrote, or a person.

        Raises:
            ValueError: if the text is not a device.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"Device.from_json: not a device ({error}): {text[:80]!r}. Expected for example "
                '{"peak_flops": 1e12, "bandwidth": 5e10, "overhead": 2e-6, "name": "phone"}.'
            ) from error


class Roofline:
    """Milliseconds that the extracted network needs at least: the sum over its operations of their bounds.

    Each operation takes ``max(FLOPs / peak, bytes / bandwidth) + overhead``, the bytes being those of all
    tensors that it reads or writes. A device whose caches hold some of them, or that fuses operations, can
    be faster; nearly all are slower. For the order of candidates, not for a promise.

    Args:
        supernet: whose architectures are counted.
        example_inputs: what the network is called with: a tensor, a tuple, or a dict of keywords; all of its
            batch is counted.
        device: the description.

    Raises:
        TypeError: if ``device`` is none.

    Reference: Williams et al., Roofline, CACM 2009; here by operation, and with an overhead.
    """

    name, unit = "roofline", "ms"

    def __init__(self, supernet: Supernet, example_inputs: Any, device: Device) -> None:
        if not isinstance(device, Device):
            raise TypeError(f"Roofline: device must be a Device(peak_flops, bandwidth), got {device!r}.")
        self.supernet, self.example_inputs, self.device = supernet, example_inputs, device
        self._seconds = Once(supernet, self._bound)

    def __repr__(self) -> str:
        return f"Roofline({type(self.supernet.model).__name__}, {self.device})"

    @property
    def conditions(self) -> dict[str, Any]:
        """What the numbers hold for."""
        return {"device": self.device.name, "shapes": shapes_of(self.example_inputs)}

    def __call__(self, architecture: Mapping[str, Value]) -> float:
        """Milliseconds of one architecture."""
        return 1e3 * self._seconds(architecture)

    def _bound(self, architecture: Architecture) -> float:
        device = self.device
        return sum(
            max(kernel.flops / device.peak_flops, kernel.bytes() / device.bandwidth) + device.overhead
            for kernel in traced(self.supernet, architecture, self.example_inputs).kernels
        )
