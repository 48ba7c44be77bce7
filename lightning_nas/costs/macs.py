"""Multiply-accumulate operations of a subnetwork, exact and without running it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from lightning_nas.costs.cost import CountTable, Term, costs
from lightning_nas.space import Value
from lightning_nas.supernet import Supernet

__all__ = ["MACs"]


@costs.register("macs")
@dataclass(frozen=True, eq=False, repr=False)
class MACs:
    """Multiply-accumulates of one forward pass on the example, all of its batch.

    The usual figure is that of a batch of one. It equals, as an integer, half of what
    ``torch.utils.flop_counter`` counts on the extracted network with unfused attention (fused attention on a
    CPU counts as nothing there). Blocks are counted by closed form; the stem and the head are measured once,
    on the meta device, for each embedding width.

    Example:
        >>> import timm, torch
        >>> supernet = Supernet(timm.create_model("vit_base_patch16_224"))
        >>> MACs(supernet, torch.zeros(1, 3, 224, 224))(supernet.space.largest)
        17563828224

    Args:
        supernet: whose architectures are counted.
        example_inputs: what the network is called with: a tensor, a tuple, or a dict of keywords.
    """

    supernet: Supernet
    example_inputs: Any
    name: str = field(default="macs", init=False)
    unit: str = field(default="MACs", init=False)
    _table: CountTable = field(init=False)

    def __post_init__(self) -> None:
        supernet = self.supernet
        anatomy, space = supernet.anatomy, supernet.space
        embeds = space["embed"].values if "embed" in space else (None,)
        rest = []
        for embed in embeds:
            smallest = space.architecture({**space.smallest, **({} if embed is None else {"embed": embed})})
            total, tokens = _measured(supernet, smallest, self.example_inputs)
            terms = [
                Term(op.block, tokens[0] * tokens[1] ** (2 if op.per == "pair" else 1), op.axes)
                for op in anatomy.operations
            ]
            rest.append(total - int(CountTable(supernet.fit, terms)([smallest])[0]))
        object.__setattr__(
            self, "_table", CountTable(supernet.fit, terms, (None if embeds == (None,) else "embed", rest))
        )

    def __repr__(self) -> str:
        return f"MACs({type(self.supernet.model).__name__})"

    def __call__(self, architecture: Mapping[str, Value]) -> int:
        """Multiply-accumulates of one architecture."""
        return int(self._table([architecture])[0])

    def many(self, architectures: Iterable[Mapping[str, Value]]) -> NDArray[np.int64]:
        """Multiply-accumulates of each of many architectures."""
        return self._table(architectures)


def _measured(
    supernet: Supernet, architecture: Mapping[str, Value], example: Any
) -> tuple[int, tuple[int, int]]:
    """Multiply-accumulates of one extracted network, and the batch and tokens that its blocks see."""
    network = supernet.extract(architecture).to("meta").eval().requires_grad_(False)
    supernet.family.unfuse(network)
    seen: list[Tensor] = []
    first = network.get_submodule(supernet.anatomy.blocks[0])
    first.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(supernet.family.tokens(args, kwargs)), with_kwargs=True
    )
    inputs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, example)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        _call(network, inputs)
    return counter.get_total_flops() // 2, (seen[0].shape[0], seen[0].shape[1])


def _call(network: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, tuple) else network(inputs)
