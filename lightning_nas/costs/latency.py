"""Measured latency and throughput of subnetworks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_nas.costs.cost import Once, costs
from lightning_nas.costs.inputs import batch_of, shapes_of
from lightning_nas.costs.isolation import Worker
from lightning_nas.costs.timing import Conditions, Measurement, on_cores, timed
from lightning_nas.costs.tracing import extracted
from lightning_nas.errors import UnsupportedError
from lightning_nas.space import Architecture, Value
from lightning_nas.supernet import Supernet

__all__ = ["Latency", "Throughput"]


@costs.register("latency")
class Latency:
    """Milliseconds of one forward pass of the extracted network, measured; the median over many passes.

    Each network is measured once, in eval and inference mode, behind warm-up passes, with a fixed number of
    threads, and in a process of its own, so that neither it nor training changes the other's settings. They
    still share the machine: fix ``cores`` where training leaves some free. On a GPU its own events tell the
    time. A measurement is noisy: :meth:`measurement` tells how much.

    A search measures whatever it proposes, and a bound on a latency makes it propose more; where that takes
    too long, make a :class:`~lightning_nas.costs.LatencyTable` once.

    Args:
        supernet: whose architectures are measured.
        example_inputs: what the network is called with: a tensor, a tuple, or a dict of keywords.
        batch_size: samples in one pass; an example of another size is filled with its first sample.
        threads: of PyTorch within one operation, on a CPU.
        warmup: passes before those that count.
        repeats: passes that count.
        device: where, as PyTorch names it; None: where the network is.
        cores: the processors that may be used (Linux); None: any.
        isolated: whether to measure in a process of its own. It needs classes that can be imported, so none
            of a notebook or of the script that is run.

    Raises:
        ValueError: for a number out of range, a device that is not here, cores that may not be used, or an
            example without values.
        UnsupportedError: for a network on the meta device, which cannot run.
        NASError: in a call, if the network fails in the other process or cannot be sent to it.
    """

    name, unit = "latency", "ms"
    is_measured = True

    def __init__(
        self,
        supernet: Supernet,
        example_inputs: Any,
        batch_size: int = 1,
        *,
        threads: int = 1,
        warmup: int = 10,
        repeats: int = 50,
        device: str | None = None,
        cores: Sequence[int] | None = None,
        isolated: bool = True,
    ) -> None:
        here = next(supernet.model.parameters()).device
        if here.type == "meta":
            raise UnsupportedError(
                f"Latency: this {type(supernet.model).__name__} is on the meta device, without weights, and "
                "cannot run. Make it on a real one; Roofline needs none."
            )
        self.supernet = supernet
        self._conditions = Conditions(
            batch_size, threads, warmup, repeats, device or str(here), None if cores is None else tuple(cores)
        )
        self._inputs = batch_of(example_inputs, batch_size)
        self._worker = Worker() if isolated else None
        self._measured = Once(supernet, self._measure)

    def __repr__(self) -> str:
        return f"Latency({type(self.supernet.model).__name__}, {self._conditions})"

    @property
    def conditions(self) -> dict[str, Any]:
        """What the numbers hold for."""
        return {**self._conditions.described(), "shapes": shapes_of(self._inputs)}

    @property
    def batch_size(self) -> int:
        """Samples in one pass."""
        return self._conditions.batch_size

    def __call__(self, architecture: Mapping[str, Value]) -> float:
        """Milliseconds of one architecture."""
        return self.measurement(architecture).median

    def measurement(self, architecture: Mapping[str, Value]) -> Measurement:
        """The median of one architecture with its quartiles and the number of passes."""
        return self._measured(architecture)

    def _measure(self, architecture: Architecture) -> Measurement:
        network = extracted(self.supernet, architecture)
        if self._worker is not None:
            return self._worker.timed(network, self._inputs, self._conditions)
        with on_cores(self._conditions.cores):
            return timed(network, self._inputs, self._conditions)


class Throughput:
    """Samples a second, from the measurements of a latency at its batch size.

    Example:
        >>> import timm, torch
        >>> supernet = Supernet(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32))
        >>> latency = Latency(supernet, torch.zeros(1, 3, 32, 32), batch_size=16, isolated=False)
        >>> throughput = Throughput(latency)
        >>> throughput(supernet.space.largest) > 0, throughput.unit
        (True, '1/s')

    To be maximised: ``Maximize(throughput)``, or a bound from below.

    Args:
        latency: whose measurements are used.
    """

    name, unit = "throughput", "1/s"
    is_measured = True

    def __init__(self, latency: Latency) -> None:
        self.latency = latency

    def __repr__(self) -> str:
        return f"Throughput({self.latency})"

    def __call__(self, architecture: Mapping[str, Value]) -> float:
        """Samples a second of one architecture."""
        return 1e3 * self.latency.batch_size / self.latency(architecture)
