"""The energy of a forward pass, from a table of what arithmetic and moving data cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_nas.costs.bytes import bits_of
from lightning_nas.costs.cost import Once, costs
from lightning_nas.costs.inputs import shapes_of
from lightning_nas.costs.tracing import traced
from lightning_nas.registry import nearest
from lightning_nas.space import Architecture, Value
from lightning_nas.supernet import Supernet

__all__ = ["HOROWITZ_45NM", "Energy", "EnergyTable"]


@dataclass(frozen=True)
class EnergyTable:
    """Picojoules by kind of work.

    Args:
        pj_per_mac: of one multiply-accumulate, by data type.
        pj_per_byte: of reading or writing one byte.
        name: for messages and tables.
    """

    pj_per_mac: Mapping[str, float]
    pj_per_byte: float = 0.0
    name: str = "energy table"


HOROWITZ_45NM = EnergyTable(
    pj_per_mac={"float32": 3.7 + 0.9, "float16": 1.1 + 0.4, "int8": 0.2 + 0.1},
    pj_per_byte=640 / 4,
    name="Horowitz, 45 nm",
)
"""A multiplication and an addition (of int8: summed in 32 bits); a byte from DRAM, of 640 pJ for 32 bits.

Reference: Horowitz, Computing's energy problem, ISSCC 2014.
"""


class Energy:
    """Millijoules of one forward pass: multiply-accumulates and bytes moved, each times its entry of a table.

    Every tensor that an operation reads or writes counts as moved. With the default table all of it comes
    from DRAM, as if there were no caches: an upper bound for what data costs. Operations other than products
    cost only their data.

    Args:
        supernet: whose architectures are counted.
        example_inputs: what the network is called with: a tensor, a tuple, or a dict of keywords; all of its
            batch is counted.
        table: picojoules by kind of work.
        dtype: the data type that weights and activations have there, one of the table's.

    Raises:
        ValueError: for a data type that the table lacks.
    """

    name, unit = "energy", "mJ"

    def __init__(
        self,
        supernet: Supernet,
        example_inputs: Any,
        table: EnergyTable = HOROWITZ_45NM,
        dtype: str = "float32",
    ) -> None:
        if dtype not in table.pj_per_mac:
            raise ValueError(
                f"Energy: {table.name} has no dtype {dtype!r}. {nearest(dtype, table.pj_per_mac)}"
            )
        self.supernet, self.example_inputs, self.table, self.dtype = supernet, example_inputs, table, dtype
        self._bits = bits_of(dtype, "Energy")
        self._picojoules = Once(supernet, self._sum)

    def __repr__(self) -> str:
        return f"Energy({type(self.supernet.model).__name__}, {self.table.name!r}, {self.dtype!r})"

    @property
    def conditions(self) -> dict[str, Any]:
        """What the numbers hold for."""
        return {"device": self.table.name, "dtype": self.dtype, "shapes": shapes_of(self.example_inputs)}

    def __call__(self, architecture: Mapping[str, Value]) -> float:
        """Millijoules of one architecture."""
        return 1e-9 * self._picojoules(architecture)

    def _sum(self, architecture: Architecture) -> float:
        mac, byte = self.table.pj_per_mac[self.dtype], self.table.pj_per_byte
        kernels = traced(self.supernet, architecture, self.example_inputs).kernels
        return sum(kernel.flops / 2 * mac + kernel.bytes(self._bits) * byte for kernel in kernels)


@costs.register("energy")
def _energy(supernet: Supernet, example_inputs: Any) -> Energy:
    return Energy(supernet, example_inputs)
