"""The size of a subnetwork's weights in bytes, by data type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_nas.costs.cost import CountTable, costs
from lightning_nas.costs.parameters import tensor_terms
from lightning_nas.registry import nearest
from lightning_nas.space import Value
from lightning_nas.supernet import Supernet

__all__ = ["Bytes", "bits_of"]

_BITS = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8,
    "int8": 8, "uint8": 8, "int4": 4, "int2": 2, "int1": 1,
}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Bytes:
    """Bytes of all weights and buffers of the extracted network, shared ones once; exact.

    Example:
        >>> import timm
        >>> supernet = Supernet(timm.create_model("vit_tiny_patch16_224"))
        >>> Bytes(supernet, "float16")(supernet.space.largest), Bytes(supernet, 4)(supernet.space.largest)
        (11434832, 2858708)

    Args:
        supernet: whose architectures are measured.
        dtype: what a floating weight is stored as: a data type's name (``"float16"``) or a number of bits;
            None: as it is. Integers, such as indices in buffers, stay as they are. What a format needs beside
            the weights, such as scales, is not counted.

    Raises:
        ValueError: for an unknown data type, or a number of bits below 1.
    """

    supernet: Supernet
    dtype: str | int | None = None
    name: str = field(default="bytes", init=False)
    unit: str = field(default="B", init=False)
    _table: CountTable = field(init=False)

    def __post_init__(self) -> None:
        bits = None if self.dtype is None else bits_of(self.dtype, "Bytes")

        def each(tensor: Tensor) -> int:
            return bits if bits is not None and tensor.is_floating_point() else 8 * tensor.element_size()

        model = self.supernet.model
        terms = tensor_terms(self.supernet, chain(model.named_parameters(), model.named_buffers()), each)
        object.__setattr__(self, "_table", CountTable(self.supernet.fit, terms))

    def __repr__(self) -> str:
        return f"Bytes({type(self.supernet.model).__name__}, {self.dtype!r})"

    def __call__(self, architecture: Mapping[str, Value]) -> int:
        """Bytes of one architecture."""
        return int(self.many([architecture])[0])

    def many(self, architectures: Iterable[Mapping[str, Value]]) -> NDArray[np.int64]:
        """Bytes of each of many architectures."""
        return -(-self._table(architectures) // 8)  # bits, rounded up to whole bytes


def bits_of(dtype: str | int, where: str) -> int:
    """The bits of one number of a data type.

    Raises:
        ValueError: for an unknown one, or a number of bits below 1.
    """
    if isinstance(dtype, str):
        if dtype not in _BITS:
            raise ValueError(
                f"{where}: unknown dtype {dtype!r}; a number of bits is possible too. {nearest(dtype, _BITS)}"
            )
        return _BITS[dtype]
    if isinstance(dtype, bool) or not isinstance(dtype, int) or dtype < 1:
        raise ValueError(
            f"{where}: dtype must be a data type's name or a number of bits from 1, got {dtype!r}."
        )
    return dtype


@costs.register("bytes")
def _bytes(supernet: Supernet, example_inputs: object) -> Bytes:
    return Bytes(supernet)
