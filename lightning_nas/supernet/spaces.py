"""Spaces made from what a network is: options as shares of its own sizes, or as absolute numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from lightning_nas.registry import nearest
from lightning_nas.space import Choice, Depth, SearchSpace
from lightning_nas.supernet.anatomy import Anatomy

__all__ = ["Options", "kind_of", "relative_space"]

Options: TypeAlias = "Sequence[float | int] | None"
"""Shares of the network's own size where they are floats in (0, 1], absolute sizes where they are ints;
None or empty: whole."""


def relative_space(
    anatomy: Anatomy,
    *,
    depth: Options | Mapping[str, Options] = None,
    keep: str | Mapping[int, Sequence[int]] = "spread",
    shared: bool = False,
    **options: Options,
) -> SearchSpace:
    """A space for one network.

    Shares are rounded to whole units, at least one, or to the sizes that a family prefers (multiples of 8). A
    choice that would only say "whole" is left out.

    Args:
        anatomy: of the network.
        depth: options for the number of blocks that run in each stage; None: all from two thirds up; ``()``:
            whole. A mapping from names (``"stages.2.depth"``) to options leaves other stages whole.
        keep: which blocks of a stage run: ``"spread"`` drops blocks evenly spaced behind the first one, of
            those that need not always run, ``"first"`` keeps the first ones, a mapping gives for each depth
            the indices kept.
        shared: one choice for all blocks (``"heads"``) in place of one each (``"layers.3.heads"``).
        **options: for each kind of choice, its last name (``heads=(0.5, 1.0), mlp=(256, 512)``), what every
            choice of that kind offers. Kinds that are not named stay whole. A ratio (``mlp_ratio=(3.0, 4.0)``
            times the width) is taken as it is.

    Returns:
        The space.

    Raises:
        ValueError: for a kind that the network does not have, a size beyond it, a share outside (0, 1], an
            unknown ``keep``, or if nothing is left to choose.
    """
    groups = [group for group in anatomy.groups.values() if group.choices]
    kinds = {kind_of(name) for group in groups for name in group.deciders}
    for kind in options:
        if kind not in kinds:
            raise ValueError(
                f"relative_space: there is nothing called {kind!r} to choose in this network. "
                f"{nearest(kind, {*kinds, 'depth', 'keep', 'shared'})}"
            )
    choices: list[Choice] = []
    runs: set[str] = set()
    for stage in anatomy.stages:
        total = len(stage.blocks)
        wanted = depth.get(stage.choice, ()) if isinstance(depth, Mapping) else depth
        if wanted is None:
            least = total - len(_droppable(total, stage.fixed))
            wanted = tuple(range(max(least, math.ceil(total * 2 / 3)), total + 1))
        offered = _offered("depth", wanted, total)
        kept = {d: _kept(keep, d, total, stage.fixed) for d in offered or (total,)}
        runs.update(stage.blocks[i] for indices in kept.values() for i in indices)
        if offered not in ((), (total,)):
            choices.append(Depth(stage.choice, offered, keeps=tuple(kept.values())))
    limits, sizes = anatomy.limits, {name: group.sizes for group in groups for name in group.choices}
    both = [names for group in groups for names in (group.choices, group.ratios) if names]
    for name in dict.fromkeys(names[-1 if shared else 0] for names in both):
        block = anatomy.block_of_choice(name)
        if block is not None and anatomy.blocks[block] not in runs:
            continue
        if name in anatomy.ratios:
            if ratios := options.get(kind_of(name)):
                choices.append(Choice(name, tuple(sorted({float(ratio) for ratio in ratios}))))
            continue
        offered = _offered(kind_of(name), options.get(kind_of(name)) or (), limits[name], sizes[name])
        if offered not in ((), (limits[name],)):
            choices.append(Choice(name, offered))
    if not choices:
        raise ValueError(
            "relative_space: nothing is left to choose; every option given is the whole network's own size."
        )
    return SearchSpace(choices)


def kind_of(name: str) -> str:
    """The last part of a choice's name: ``"heads"`` of ``"layers.3.heads"``."""
    return name.rpartition(".")[2]


def _offered(
    kind: str, options: Sequence[float | int], limit: int, sizes: Sequence[int] = ()
) -> tuple[int, ...]:
    for option in options:
        if not (0 < option <= 1 if isinstance(option, float) else 1 <= option <= limit):
            raise ValueError(
                f"relative_space: {kind} cannot be {option!r}; give a float in (0, 1] for a share, or an int "
                f"from 1 to {limit}, which is all that this network has."
            )
    return tuple(sorted({_units(o * limit, sizes) if isinstance(o, float) else int(o) for o in options}))


def _units(share: float, sizes: Sequence[int]) -> int:
    """The nearest size that can be offered, of two the larger one."""
    return min(sizes, key=lambda size: (abs(size - share), -size)) if sizes else max(1, round(share))


def _kept(
    keep: str | Mapping[int, Sequence[int]], depth: int, total: int, fixed: tuple[int, ...]
) -> tuple[int, ...]:
    if isinstance(keep, Mapping):
        if depth not in keep:
            raise ValueError(
                f"relative_space: keep must name the blocks for depth {depth}, got depths {sorted(keep)}."
            )
        return tuple(keep[depth])
    if keep == "first":
        return tuple(range(depth))
    if keep != "spread":
        raise ValueError(f"relative_space: keep must be 'spread', 'first' or a mapping, got {keep!r}.")
    out, candidates = total - depth, _droppable(total, fixed)
    if out > len(candidates):
        raise ValueError(
            f"relative_space: depth cannot be {depth!r}: {total - len(candidates)} blocks must always run."
        )
    dropped = {candidates[int((j + 0.5) * len(candidates) / out)] for j in range(out)}
    return tuple(i for i in range(total) if i not in dropped)


def _droppable(total: int, fixed: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks behind the first one that may be dropped."""
    return tuple(i for i in range(1, total) if i not in fixed)
