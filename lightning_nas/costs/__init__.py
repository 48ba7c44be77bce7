"""Costs: an architecture to a number with a unit, known without training."""

from lightning_nas.costs.bytes import Bytes
from lightning_nas.costs.cost import Cost, costs, resolve
from lightning_nas.costs.energy import HOROWITZ_45NM, Energy, EnergyTable
from lightning_nas.costs.latency import Latency, Throughput
from lightning_nas.costs.macs import MACs
from lightning_nas.costs.memory import PeakMemory
from lightning_nas.costs.parameters import Parameters
from lightning_nas.costs.roofline import Device, Roofline
from lightning_nas.costs.table import LatencyTable, TableError
from lightning_nas.costs.timing import Measurement

__all__ = [
    "HOROWITZ_45NM",
    "Bytes",
    "Cost",
    "Device",
    "Energy",
    "EnergyTable",
    "Latency",
    "LatencyTable",
    "MACs",
    "Measurement",
    "Parameters",
    "PeakMemory",
    "Roofline",
    "TableError",
    "Throughput",
    "costs",
    "resolve",
]
