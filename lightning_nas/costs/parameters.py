"""The number of parameters of a subnetwork."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_nas.costs.cost import CountTable, Term, costs
from lightning_nas.space import Value
from lightning_nas.supernet import Segment, Supernet

__all__ = ["Parameters", "tensor_terms"]


@dataclass(frozen=True, eq=False, repr=False)
class Parameters:
    """Entries of all parameters of the extracted network, trained or not, shared ones once; exact.

    Example:
        >>> import timm
        >>> supernet = Supernet(timm.create_model("vit_tiny_patch16_224"))
        >>> Parameters(supernet)(supernet.space.largest)
        5717416

    Args:
        supernet: whose architectures are counted.
    """

    supernet: Supernet
    name: str = field(default="params", init=False)
    unit: str = field(default="parameters", init=False)
    _table: CountTable = field(init=False)

    def __post_init__(self) -> None:
        terms = tensor_terms(self.supernet, self.supernet.model.named_parameters())  # a shared one comes once
        object.__setattr__(self, "_table", CountTable(self.supernet.fit, terms))

    def __repr__(self) -> str:
        return f"Parameters({type(self.supernet.model).__name__})"

    def __call__(self, architecture: Mapping[str, Value]) -> int:
        """Parameters of one architecture."""
        return int(self._table([architecture])[0])

    def many(self, architectures: Iterable[Mapping[str, Value]]) -> NDArray[np.int64]:
        """Parameters of each of many architectures."""
        return self._table(architectures)


@costs.register("params")
def _parameters(supernet: Supernet, example_inputs: Any) -> Parameters:
    return Parameters(supernet)


def tensor_terms(
    supernet: Supernet,
    tensors: Iterable[tuple[str, Tensor]],
    each: Callable[[Tensor], int] = lambda tensor: 1,
) -> Iterator[Term]:
    """What tensors of a network count in its subnetworks: their entries, times what ``each`` entry counts."""
    anatomy = supernet.anatomy
    elastic = {
        f"{part.module}.{name}".lstrip("."): axes
        for part in anatomy.parts
        for name, axes in part.axes.items()
    }
    temporary = {f"{part.module}.{name}".lstrip(".") for part in anatomy.parts for name in part.temporary}
    for name, tensor in tensors:
        if name not in temporary:
            axes = elastic.get(name, tuple((Segment(length),) for length in tensor.shape))
            yield Term(anatomy.block_of(name), each(tensor), axes)
