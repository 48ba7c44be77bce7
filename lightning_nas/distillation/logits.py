"""Losses between the outputs of two networks, and how several teachers speak with one voice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OutputReader", "normalized_mse", "read_output", "soft_cross_entropy", "soft_kl", "vote"]

OutputReader: TypeAlias = Callable[[Any], Tensor]
"""Takes what a network returned, gives the tensor to distil: logits ``(batch, ..., classes)`` or features."""


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the student's distribution under the teacher's, times the squared temperature.

    ``T^2 * mean_i( - sum_c p_ic log q_ic )`` with ``p = softmax(teacher / T)``, ``q = softmax(student / T)``.
    Its gradient in the student is that of :func:`soft_kl`.

    Args:
        student: logits, ``(..., classes)``; with one class, the logit of a sigmoid.
        teacher: logits of the same shape; no gradient flows into them.
        temperature: above 0.

    Returns:
        A scalar: the mean over all leading dimensions.

    Raises:
        ValueError: if the shapes differ or the temperature is not above 0.

    Reference: Hinton et al., 2015, section 2; the in-place form is Yu et al., BigNAS, ECCV 2020, section 3.2.
    """
    log_q, p = _distributions("soft_cross_entropy", student, teacher, temperature)
    return -(p * log_q).sum(-1).mean() * temperature**2


def soft_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the teacher's distribution to the student's, times T squared.

    ``T^2 * mean_i( sum_c p_ic (log p_ic - log q_ic) )``: :func:`soft_cross_entropy` less the teacher's own
    entropy, so it is 0 where both agree.

    Args:
        student: logits, ``(..., classes)``.
        teacher: logits of the same shape; no gradient flows into them.
        temperature: above 0.

    Returns:
        A scalar: the mean over all leading dimensions, at least 0.

    Raises:
        ValueError: if the shapes differ or the temperature is not above 0.

    Reference: Hinton et al., 2015, section 2.
    """
    log_q, p = _distributions("soft_kl", student, teacher, temperature)
    return F.kl_div(log_q, p, reduction="none").sum(-1).mean() * temperature**2


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of features, each scaled to unit length over its last dimension.

    ``mean_i || s_i / |s_i| - t_i / |t_i| ||^2``, between 0 and 4.

    Args:
        student: features, ``(..., width)``.
        teacher: features of the same shape; no gradient flows into them.

    Returns:
        A scalar: the mean over all leading dimensions.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes("normalized_mse", student, teacher)
    s, t = F.normalize(student.float(), dim=-1), F.normalize(teacher.detach().float(), dim=-1)
    return (s - t).square().sum(-1).mean()


def vote(
    teachers: Sequence[Tensor], temperature: float = 1.0, rule: Literal["mean", "majority"] = "mean"
) -> Tensor:
    """Logits that say, at this temperature, what several teachers say together.

    ``softmax(result / T)`` is, for ``"mean"``, the mean of ``softmax(teacher / T)``; for ``"majority"``, all
    on the class that most teachers hold the likeliest, and where classes tie, the mean again.

    Args:
        teachers: logits of each, ``(..., classes)``; with one class, the logit of a sigmoid.
        temperature: above 0, and the one at which the result is used.
        rule: how votes are counted.

    Returns:
        Logits of the same shape, without a gradient; ``-inf`` for a class that has no chance. The mean of one
        teacher is his own.

    Raises:
        ValueError: if there is no teacher, shapes differ, the temperature is not above 0, or for an unknown
            rule.

    Reference: Zhu et al., SD-DARTS, 2023 (average voting over earlier supernets).
    """
    if rule not in ("mean", "majority"):
        raise ValueError(f"vote: rule must be 'mean' or 'majority', got {rule!r}.")
    if not teachers:
        raise ValueError("vote: at least one teacher is needed, got none.")
    if rule == "mean" and len(teachers) == 1:
        return teachers[0].detach()
    said = torch.stack([_distributions("vote", teachers[0], t, temperature)[1] for t in teachers])
    p = said.mean(0)
    if rule == "majority":
        votes = F.one_hot(said.argmax(-1), said.shape[-1]).sum(0)
        winners = votes == votes.amax(-1, keepdim=True)
        is_decided = winners.sum(-1, keepdim=True) == 1
        p = torch.where(is_decided, winners.to(p.dtype), p)
    log_p = p.log()
    if teachers[0].shape[-1] == 1:
        log_p = log_p[..., :1] - log_p[..., 1:]
    return log_p * temperature


def read_output(output: Any) -> Tensor:
    """The tensor to distil in whatever a network returned.

    A tensor itself; ``.logits`` or ``["logits"]``; ``.start_logits`` and ``.end_logits``, stacked to
    ``(batch, 2, tokens)``; else, of a tuple, list, mapping or dataclass in its own order, the first floating
    tensor that is no scalar, as a loss is.

    Raises:
        TypeError: if there is none; a function given as ``output=`` reads what is not plain.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    start, end = (getattr(output, f"{end}_logits", None) for end in ("start", "end"))
    if isinstance(start, Tensor) and isinstance(end, Tensor):  # of question answering: classes are tokens
        return torch.stack((start, end), 1)
    for item in _items(output):
        if isinstance(item, Tensor) and item.is_floating_point() and (item.ndim or item is output):
            return item
    raise TypeError(
        f"No logits in the network's output of type {type(output).__name__}: expected a tensor, .logits, "
        "['logits'], or a tuple with a floating tensor. Pass output=, a function that reads them."
    )


def _items(output: Any) -> list[Any]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, tuple | list):
        return list(output)
    if is_dataclass(output):
        return [getattr(output, f.name) for f in fields(output)]
    return []


def _distributions(where: str, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if temperature <= 0:
        raise ValueError(f"{where}: temperature must be above 0, got {temperature}.")
    _check_shapes(where, student, teacher)
    if student.shape[-1] == 1:  # the sigmoid of z is the softmax of (z, 0)
        student, teacher = (torch.cat([z, torch.zeros_like(z)], dim=-1) for z in (student, teacher))
    # Half-precision logits lose the small probabilities that distillation is about.
    full = torch.promote_types(student.dtype, torch.float32)
    log_q = F.log_softmax(student.to(full) / temperature, dim=-1)
    return log_q, F.softmax(teacher.detach().to(full) / temperature, dim=-1)


def _check_shapes(where: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{where}: student and teacher must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
