"""Subnetworks that begin alike share what they compute: each block keeps what it last gave, for one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_nas.space import Value
from lightning_nas.supernet.layers import cut_of
from lightning_nas.supernet.supernet import Supernet

__all__ = ["SharedPrefixes"]


@dataclass(frozen=True)
class _Kept:
    """One execution of a block."""

    own: int  # what the architecture made of the block
    given: Any
    gave: Any
    versions: tuple[int, ...]  # a tensor that was changed in place since counts for nothing

    @classmethod
    def of(cls, own: int, given: Any, gave: Any) -> _Kept | None:
        tensors = _tensors((given, gave))
        if not _is_plain((given, gave)) or any(tensor.is_inference() for tensor in tensors):
            return None
        return cls(own, given, gave, tuple(tensor._version for tensor in tensors))

    def answers(self, own: int, given: Any) -> bool:
        if own != self.own:
            return False
        current = tuple(tensor._version for tensor in _tensors((self.given, self.gave)))
        return current == self.versions and _is_same(given, self.given)


class SharedPrefixes:
    """Lets subnetworks that run one after another on one batch share the outputs of equal first blocks.

    A block does not run where it would compute what it computed last: it is cut as it was then, and is given
    the same bits. What lies outside the blocks always runs, so outputs are those of plain runs bit for bit,
    whatever else is elastic. It pays where subnetworks come in the order of :meth:`path`: then each different
    beginning runs once. Memory: one output a block.

    Not shared, but run as ever: networks with batch norm, whose statistics are each subnetwork's own; masked
    ones; those with hooks inside their blocks, which would miss calls; and a block that is given a cache.

    Args:
        supernet: in evaluation mode, without gradients, while :meth:`on`.

    Attributes:
        executed: blocks that ran.
        skipped: blocks whose output was kept.
    """

    def __init__(self, supernet: Supernet) -> None:
        self.supernet, self.executed, self.skipped = supernet, 0, 0
        anatomy = supernet.anatomy
        self._blocks = [supernet.model.get_submodule(name) for name in anatomy.blocks]
        self._parts = [
            [part for part in anatomy.parts if anatomy.block_of(part.module) == i]
            for i in range(len(self._blocks))
        ]
        self._ids: dict[str, int] = {}
        self._kept: dict[int, _Kept | None] = {}
        self._own: dict[int, int] = {}

    @property
    def can_share(self) -> bool:
        """Whether this network's blocks may be left out."""
        inside = (m for block in self._blocks for m in block.modules() if m is not block)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in inside)
        return self.supernet.execution == "slice" and not (self.supernet.batch_norms or hooked)

    def path(self, architecture: Mapping[str, Value]) -> tuple[tuple[int, int], ...]:
        """The blocks that run, each with a number for what the architecture makes of it."""
        sizes = self.supernet.fit.sizes(architecture)
        path = []
        for i in self.supernet.fit.kept(architecture):
            state = [
                (
                    {name: cut_of(axes, sizes) for name, axes in part.axes.items()},
                    {name: value(sizes) for name, value in part.attributes.items()},
                )
                for part in self._parts[i]
            ]
            path.append((i, self._ids.setdefault(repr(state), len(self._ids))))
        return tuple(path)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Share inside the ``with`` block, where the network can."""
        if not self.can_share:
            yield
            return
        with ExitStack() as undo:
            undo.callback(self.forget)
            for i, block in enumerate(self._blocks):
                before = block.__dict__.get("forward")
                run = partial(type(block).forward, block) if before is None else before
                block.__dict__["forward"] = partial(self._run, i, run)
                undo.callback(_put_back, block, before)
            yield

    def use(self, path: tuple[tuple[int, int], ...]) -> None:
        """The architecture of this path is active from now on."""
        self._own = dict(path)

    def forget(self) -> None:
        """Another batch comes: keep nothing."""
        self._kept.clear()

    def _run(self, block: int, run: Any, *args: Any, **kwargs: Any) -> Any:
        own, given = self._own[block], (args, kwargs)
        kept = self._kept.get(block)
        if kept is not None and kept.answers(own, given):
            self.skipped += 1
            return kept.gave
        self._kept[block] = kept = None  # frees the memory before more is needed
        gave = run(*args, **kwargs)
        self.executed += 1
        self._kept[block] = _Kept.of(own, given, gave)
        return gave


def _put_back(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del block.__dict__["forward"]
    else:
        block.__dict__["forward"] = forward


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_plain(value: Any) -> bool:
    """Whether it is made of tensors, numbers and plain containers: what no call changes on its way."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        is_alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return is_alike and bool(one.equal(other))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    return bool(one == other)
