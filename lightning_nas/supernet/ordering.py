"""Which units matter most, and how they are moved to the front without changing what the network computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_nas.supernet.anatomy import Anatomy, Axis, Group
from lightning_nas.supernet.layers import tensor_of

__all__ = ["Permutation", "magnitude_scores", "permute_like", "reorder", "taylor_scores", "ways_out"]


@dataclass(frozen=True, eq=False)
class Permutation:
    """A reordering of one dimension of a parameter: the entry at ``index[i]`` moves to ``i``."""

    dim: int
    index: Tensor


def permute_like(tensor: Tensor, permutations: Sequence[Permutation]) -> None:
    """Apply in place what was done to a parameter to a tensor of its shape: a moment, an averaged copy.

    Raises:
        ValueError: if the tensor's shape is not the parameter's.
    """
    for permutation in permutations:
        dim, index = permutation.dim, permutation.index
        if tensor.ndim <= dim or tensor.shape[dim] != len(index):
            raise ValueError(
                f"permute_like: dimension {dim} must have {len(index)} entries as the parameter has, "
                f"got a tensor of shape {tuple(tensor.shape)}."
            )
    with torch.no_grad():
        for permutation in permutations:
            index = permutation.index.to(tensor.device)
            tensor.copy_(tensor.index_select(permutation.dim, index))


def taylor_scores(anatomy: Anatomy, model: nn.Module) -> dict[str, Tensor]:
    r"""First-order importance of every unit, read from the gradients that the weights hold.

    :math:`|\sum W \, \partial L / \partial W|` over the columns through which a unit's contribution leaves.
    Units whose weights have no gradient (frozen layers) are left out.

    Raises:
        ValueError: if none of these weights has a gradient.

    Reference: Molchanov et al., CVPR 2019, equation 8, with the sum over a group of weights.
    """
    scores = {}
    for group in _ordered(anatomy):
        _, weight = _way_out(model, group)
        if weight.grad is not None:
            with torch.no_grad():
                scores[group.name] = _by_unit(anatomy, group, weight * weight.grad).sum(1).abs()
    if not scores:
        raise ValueError(
            "importance: no weight has a gradient. Call backward() on a loss of the largest network first."
        )
    return scores


def magnitude_scores(anatomy: Anatomy, model: nn.Module) -> dict[str, Tensor]:
    r"""Importance of every unit without data: :math:`\sum |W|` over the columns through which it leaves."""
    with torch.no_grad():
        return {
            group.name: _by_unit(anatomy, group, _way_out(model, group)[1].abs()).sum(1)
            for group in _ordered(anatomy)
        }


def reorder(
    anatomy: Anatomy, model: nn.Module, scores: Mapping[str, Tensor]
) -> dict[Tensor, list[Permutation]]:
    """Move the units with the highest scores to the front, in place, with the gradients in flight.

    Equal scores keep their order. See :meth:`Supernet.reorder`.
    """
    orders = {}
    known = {group.name: group for group in _ordered(anatomy)}
    for name, score in scores.items():
        if name not in known:
            raise ValueError(f"reorder: no group {name!r} to order. Known: {', '.join(known)}.")
        if score.shape != (known[name].units,) or not bool(torch.isfinite(score).all()):
            raise ValueError(
                f"reorder: {name!r} needs {known[name].units} finite scores, got a tensor of shape "
                f"{tuple(score.shape)} with {int((~torch.isfinite(score)).sum())} that are not finite."
            )
        order = torch.argsort(score, descending=True, stable=True)
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            orders[name] = order.cpu()
    done: dict[Tensor, list[Permutation]] = {}
    for part in anatomy.parts:
        owner = model.get_submodule(part.module)
        for name, axes in part.axes.items():
            tensor = tensor_of(owner, name)
            if tensor is None or tensor in done:
                continue
            moves = [
                Permutation(dim, _index(axis, orders))
                for dim, axis in enumerate(axes)
                if _moves(axis, orders)
            ]
            if moves:
                permute_like(tensor, moves)
                if tensor.grad is not None:
                    permute_like(tensor.grad, moves)
                done[tensor] = moves
    return done


def ways_out(anatomy: Anatomy, model: nn.Module) -> list[nn.Parameter]:
    """The weights whose gradients :func:`taylor_scores` reads."""
    return list(
        {id(weight): weight for weight in (_way_out(model, g)[1] for g in _ordered(anatomy))}.values()
    )


def _ordered(anatomy: Anatomy) -> list[Group]:
    return [group for group in anatomy.groups.values() if group.way_out is not None]


def _way_out(model: nn.Module, group: Group) -> tuple[str, nn.Parameter]:
    module, name = group.way_out or ("", "")
    parameter = model.get_submodule(module)._parameters[name]
    assert parameter is not None
    return f"{module}.{name}", parameter


def _by_unit(anatomy: Anatomy, group: Group, values: Tensor) -> Tensor:
    """The entries of a way out by the unit they come from, ``(units, entries of a unit)``."""
    module, name = group.way_out or ("", "")
    axes = next(part for part in anatomy.parts if part.module == module).axes[name]
    dim, start = next(
        (dim, sum(s.units * s.size for s in axis[:place]))
        for dim, axis in enumerate(axes)
        for place, segment in enumerate(axis)
        if segment.group == group.name
    )
    per_unit = next(segment for segment in axes[dim] if segment.group == group.name).size
    columns = values.narrow(dim, start, group.units * per_unit).movedim(dim, 0)
    by_unit: Tensor = columns.reshape(group.units, -1)
    return by_unit


def _moves(axis: Axis, orders: Mapping[str, Tensor]) -> bool:
    return any(segment.group in orders for segment in axis)


def _index(axis: Axis, orders: Mapping[str, Tensor]) -> Tensor:
    pieces, start = [], 0
    for segment in axis:
        entries = torch.arange(start, start + segment.units * segment.size).view(segment.units, segment.size)
        order = orders.get(segment.group or "")
        pieces.append((entries if order is None else entries[order]).flatten())
        start += segment.units * segment.size
    return torch.cat(pieces)
