"""Costs: an architecture to a number with a unit, known without training."""

from lightning_nas.costs.cost import Cost, costs, resolve
from lightning_nas.costs.macs import MACs
from lightning_nas.costs.parameters import Parameters

__all__ = ["Cost", "MACs", "Parameters", "costs", "resolve"]
