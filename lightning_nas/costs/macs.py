"""Multiply-accumulate operations of a subnetwork, exact and without running it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from lightning_nas.costs.cost import CountTable, Term, costs
from lightning_nas.costs.inputs import call
from lightning_nas.space import Architecture, Value
from lightning_nas.supernet import Supernet

__all__ = ["MACs"]


@costs.register("macs")
@dataclass(frozen=True, eq=False, repr=False)
class MACs:
    """Multiply-accumulates of one forward pass on the example, all of its batch.

    The usual figure is that of a batch of one. It equals, as an integer, half of what
    ``torch.utils.flop_counter`` counts on the extracted network with unfused attention (fused attention on a
    CPU counts as nothing there). What depends on the architecture is counted by closed form; how often each
    layer works, and what it costs that never changes, is measured once, on the meta device, or, where a
    network looks at the values of its inputs (a mask that decides what is a token), by running a copy.

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
        anatomy, largest = supernet.anatomy, supernet.space.largest
        counts = {a: _measured(supernet, a, self.example_inputs) for a in _that_run_all_blocks(supernet)}
        works = {key: work for count in reversed(counts.values()) for key, work in count.works.items()}
        terms = [
            Term(anatomy.block_of(operation.module), works[operation.module, operation.per], operation.axes)
            for operation in anatomy.operations
            if (operation.module, operation.per) in works  # a block that no depth keeps has no work
        ]
        for architecture, count in counts.items():
            for block, spent in count.inside.items():  # what no choice changes in a block goes with the block
                own = [term for term in terms if term.block == block]
                if fixed := spent - int(CountTable(supernet.fit, own)([architecture])[0]):
                    terms.append(Term(block, fixed, ()))
        rest = counts[largest].total - int(CountTable(supernet.fit, terms)([largest])[0])
        object.__setattr__(self, "_table", CountTable(supernet.fit, terms, rest))

    def __repr__(self) -> str:
        return f"MACs({type(self.supernet.model).__name__})"

    def __call__(self, architecture: Mapping[str, Value]) -> int:
        """Multiply-accumulates of one architecture."""
        return int(self._table([architecture])[0])

    def many(self, architectures: Iterable[Mapping[str, Value]]) -> NDArray[np.int64]:
        """Multiply-accumulates of each of many architectures."""
        return self._table(architectures)


def _that_run_all_blocks(supernet: Supernet) -> Iterator[Architecture]:
    """The largest architecture, and others with the blocks that only smaller depths keep."""
    space, seen = supernet.space, set(supernet.fit.kept(supernet.space.largest))
    yield space.largest
    for stage in supernet.anatomy.stages:
        for depth in space[stage.choice].values if stage.choice in space else ():
            architecture = space.canonical({**space.largest, stage.choice: depth})
            kept = set(supernet.fit.kept(architecture))
            if not kept <= seen:
                seen |= kept
                yield architecture


class _Counts(NamedTuple):
    """Multiply-accumulates of a network and of each block, and how often each operation works."""

    total: int
    inside: dict[int, int]
    works: dict[tuple[str, str], int]


def _measured(supernet: Supernet, architecture: Mapping[str, Value], example: Any) -> _Counts:
    """Counts of one network, on the meta device where that is enough."""
    try:
        return _counted(supernet, architecture, supernet.skeleton(architecture), example)
    except RuntimeError:  # tensors on the meta device have no values; what else is wrong is wrong again
        return _counted(supernet, architecture, supernet.extract(architecture), example)


def _counted(
    supernet: Supernet, architecture: Mapping[str, Value], network: nn.Module, example: Any
) -> _Counts:
    network.eval().requires_grad_(False)
    supernet.family.unfuse(network)
    works: Counter[tuple[str, str]] = Counter()
    names = _names_in_copy(supernet, supernet.fit.kept(architecture))
    for name, per in {(operation.module, operation.per) for operation in supernet.anatomy.operations}:
        if (there := names(name)) is not None:
            network.get_submodule(there).register_forward_hook(_count(works, (name, per)), with_kwargs=True)
    counter = FlopCounterMode(display=False)
    spent: Counter[int] = Counter()
    for i, name in enumerate(supernet.anatomy.blocks):
        if (there := names(name)) is not None:
            block = network.get_submodule(there)
            block.register_forward_pre_hook(partial(_add_total, counter, spent, i, -1))
            block.register_forward_hook(partial(_add_total, counter, spent, i, 1))
    with torch.no_grad(), torch.random.fork_rng([]), ExitStack() as stack:
        device = next(network.parameters()).device
        fake = None
        if device.type == "meta":
            # Networks that look at values (for padding, say) know that tensors which say they are fake have
            # none.
            fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(counter)
        inputs = tree_map(partial(_placed, device, fake), example)
        call(network, inputs)
    inside = {block: flops // 2 for block, flops in spent.items()}
    return _Counts(counter.get_total_flops() // 2, inside, dict(works))


def _add_total(counter: FlopCounterMode, spent: Counter[int], block: int, sign: int, *_: Any) -> None:
    """A hook that adds what was counted so far, with a sign: minus before a block, plus behind it."""
    spent[block] += sign * counter.get_total_flops()


def _placed(device: torch.device, fake: FakeTensorMode | None, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    moved = value.to(device)
    return moved if fake is None else fake.from_tensor(moved)


def _count(works: Counter[tuple[str, str]], key: tuple[str, str]) -> Any:
    """A forward hook that adds up positions of the output, or pairs of tokens of the input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if key[1] == "pair":
            *leading, tokens, _ = (args[0] if args else next(iter(kwargs.values()))).shape
            works[key] += math.prod(leading) * tokens**2
        else:
            channels = 1 if isinstance(module, _ConvNd) else -1
            works[key] += output.numel() // output.shape[channels]

    return hook


def _names_in_copy(supernet: Supernet, kept: tuple[int, ...]) -> Callable[[str], str | None]:
    """Names of modules in an extracted network, whose blocks are numbered anew."""
    anatomy = supernet.anatomy
    renamed: dict[str, str] = {}
    for stage in anatomy.stages:
        container = stage.blocks[0].rpartition(".")[0]
        runs = [block for block in stage.blocks if anatomy.blocks.index(block) in kept]
        short = len(runs) < len(stage.blocks)
        renamed.update((block, f"{container}.{i}" if short else block) for i, block in enumerate(runs))

    def name_there(name: str) -> str | None:
        block = anatomy.block_of(name)
        if block is None:
            return name
        old = anatomy.blocks[block]
        return renamed[old] + name[len(old) :] if old in renamed else None

    return name_there
