"""Timing one network: warm-up, then single passes, of which the median counts."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_nas.costs.inputs import call

__all__ = ["Conditions", "Measurement", "on_cores", "timed"]


@dataclass(frozen=True)
class Measurement:
    """What repeated passes took.

    Args:
        median: milliseconds of half of the passes at most.
        lower: of a quarter of them, the first quartile.
        upper: of three quarters.
        repeats: how many passes there were.
    """

    median: float
    lower: float
    upper: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Measurement:
        """The quartiles of passes given in seconds."""
        lower, median, upper = (float(1e3 * q) for q in np.quantile(seconds, (0.25, 0.5, 0.75)))
        return cls(median, lower, upper, len(seconds))


@dataclass(frozen=True)
class Conditions:
    """How networks are timed.

    Args:
        batch_size: samples in one pass.
        threads: of PyTorch within one operation, on a CPU.
        warmup: passes that are not counted.
        repeats: passes that are.
        device: where, as PyTorch names it.
        cores: the processors that may be used (Linux); None: any.

    Raises:
        ValueError: for a number out of range, an unknown device or one that is not here, or cores that this
            process may not use.
    """

    batch_size: int = 1
    threads: int = 1
    warmup: int = 10
    repeats: int = 50
    device: str = "cpu"
    cores: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("threads", 1), ("warmup", 0), ("repeats", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Latency: {name} must be an integer from {least}, got {value!r}.")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"Latency: there is no device {self.device!r} here ({str(error).splitlines()[0]}). Give one "
                "that is, as 'cpu', or measure a table there: python -m lightning_nas.costs.measure --help."
            ) from error
        if self.cores is not None:
            if not hasattr(os, "sched_getaffinity"):
                raise ValueError(
                    f"Latency: cores can be fixed on Linux, not on {sys.platform}; leave cores=None."
                )
            usable = os.sched_getaffinity(0)
            if not self.cores or not usable.issuperset(self.cores):
                raise ValueError(
                    f"Latency: cores must be some of those this process may use, {sorted(usable)}, "
                    f"got {list(self.cores)}."
                )

    @property
    def device_name(self) -> str:
        """The processor's name."""
        device = torch.device(self.device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(device)

    def described(self) -> dict[str, Any]:
        """As JSON can write it, with the processor's name for the device."""
        return {**asdict(self), "device": self.device_name, "torch": torch.__version__}


def timed(network: nn.Module, inputs: Any, conditions: Conditions) -> Measurement:
    """Time a network of one's own: it is moved to the device and put into eval mode.

    Args:
        network: what is timed.
        inputs: what it is called with, of the batch size meant.
        conditions: how.
    """
    device = torch.device(conditions.device)
    network.to(device).eval()
    inputs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)
    with _threads(conditions.threads), torch.random.fork_rng([]), torch.inference_mode():
        for _ in range(conditions.warmup):
            call(network, inputs)
        return Measurement.of([_seconds(network, inputs, device) for _ in range(conditions.repeats)])


@contextmanager
def on_cores(cores: Sequence[int] | None) -> Iterator[None]:
    """Run this thread on the given processors alone."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(network: nn.Module, inputs: Any, device: torch.device) -> float:
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record(stream)
        call(network, inputs)
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    _wait(device)
    before = time.perf_counter()
    call(network, inputs)
    _wait(device)
    return time.perf_counter() - before


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _processor(device: torch.device) -> str:
    if device.type != "cpu":
        return f"{platform.machine()} {device.type}"
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
