"""Losses between what two networks hold inside: hidden states, relations of tokens, outputs of blocks.

``mask`` is true where a token counts, ``(batch, tokens)``; whatever is padding changes no loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "RelationKind",
    "block_loss",
    "hidden_state_loss",
    "noise_to_signal",
    "qkv_relation_loss",
    "relation_loss",
]

RelationKind: TypeAlias = Literal["mse_softmax", "mse_scores", "kl"]


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    heads: int,
    kind: RelationKind = "mse_softmax",
    mask: Tensor | None = None,
) -> Tensor:
    """How far apart two networks are in what they find similar: relations of tokens, whatever the widths.

    The vectors are cut into ``heads`` relation heads of ``d = width // heads`` numbers each, a remainder is
    dropped, and within each head ``scores = X X^T / sqrt(d)``, ``R = softmax(scores)`` over the last
    dimension. Both are the same for any rotation of the vectors inside a head.

    ``"mse_softmax"``: mean square of ``R_teacher - R_student``, the paper's; ``"mse_scores"``: of the scores,
    as the authors' code does; ``"kl"``: mean over rows of ``KL(R_teacher || R_student)``, as in MiniLMv2.

    Args:
        student: queries, keys or values, ``(batch, tokens, width)``.
        teacher: the teacher's, ``(batch, tokens, its width)``; no gradient flows into them.
        heads: relation heads, at least 1 and at most each width; in the paper the teacher's attention heads.
        kind: of the distance.
        mask: true where a token counts, ``(batch, tokens)``; None: everywhere.

    Returns:
        A scalar: the mean over heads and over the cells (for ``"kl"``: rows) whose tokens count.

    Raises:
        ValueError: for an unknown kind, or shapes that do not fit.

    Reference: Xu et al., AutoDistil, NeurIPS 2022, equation 4; Wang et al., MiniLMv2, Findings of ACL 2021.
    Unlike theirs, padding is left out of the mean, so that a longer padding changes nothing.
    """
    if kind not in ("mse_softmax", "mse_scores", "kl"):
        raise ValueError(f"relation_loss: kind must be 'mse_softmax', 'mse_scores' or 'kl', got {kind!r}.")
    _check_tokens("relation_loss", student, teacher, mask)
    if not 1 <= heads <= min(student.shape[-1], teacher.shape[-1]):
        raise ValueError(
            f"relation_loss: heads must be from 1 to the smaller width, got {heads} for widths "
            f"{student.shape[-1]} and {teacher.shape[-1]}."
        )
    s, t = _scores(student, heads), _scores(teacher.detach(), heads)
    valid = torch.ones(student.shape[:2], device=s.device, dtype=torch.bool) if mask is None else mask.bool()
    cells = (valid[:, :, None] & valid[:, None, :])[:, None]
    if kind == "mse_scores":
        return _mean((s - t).square(), cells)
    # Finite, so that the rows of padding stay free of NaN: they are left out of the mean.
    s, t = (x.masked_fill(~valid[:, None, None, :], torch.finfo(x.dtype).min) for x in (s, t))
    if kind == "mse_softmax":
        return _mean((s.softmax(-1) - t.softmax(-1)).square(), cells)
    rows = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)
    return _mean(rows, valid[:, None, :])


def qkv_relation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    heads: int,
    kind: RelationKind = "mse_softmax",
    mask: Tensor | None = None,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Relations of queries, of keys and of values: the weighted sum of three :func:`relation_loss`.

    Args:
        student: queries, keys, values of one layer, each ``(batch, tokens, width)``.
        teacher: the teacher's.
        heads: relation heads.
        kind: of the distance.
        mask: true where a token counts, ``(batch, tokens)``.
        weights: of the three.

    Raises:
        ValueError: if there are not three of each, or as :func:`relation_loss` does.

    Reference: Xu et al., AutoDistil, NeurIPS 2022, equation 4.
    """
    if not len(student) == len(teacher) == len(weights) == 3:
        raise ValueError(
            "qkv_relation_loss: queries, keys and values are three, and so are their weights; got "
            f"{len(student)}, {len(teacher)} and {len(weights)}."
        )
    losses = [
        weight * relation_loss(s, t, heads, kind, mask)
        for s, t, weight in zip(student, teacher, weights, strict=True)
    ]
    return torch.stack(losses).sum()


def hidden_state_loss(
    student: Tensor,
    teacher: Tensor,
    kind: Literal["mse", "cosine"] = "mse",
    mask: Tensor | None = None,
) -> Tensor:
    """How far apart the hidden states of two networks are, token by token.

    ``"mse"``: the mean square of the difference; ``"cosine"``: one minus the cosine, which ignores lengths.

    Args:
        student: ``(batch, tokens, width)``.
        teacher: of the same shape; no gradient flows into it.
        kind: of the distance.
        mask: true where a token counts, ``(batch, tokens)``; None: everywhere.

    Returns:
        A scalar: the mean over the tokens that count, and for ``"mse"`` over the width.

    Raises:
        ValueError: for an unknown kind, or shapes that do not fit.

    Reference: Jiao et al., TinyBERT, Findings of EMNLP 2020, equation 8, without its projection.
    """
    if kind not in ("mse", "cosine"):
        raise ValueError(f"hidden_state_loss: kind must be 'mse' or 'cosine', got {kind!r}.")
    _check_tokens("hidden_state_loss", student, teacher, mask)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"hidden_state_loss: widths differ, {student.shape[-1]} and {teacher.shape[-1]}. Compare "
            "relations of tokens (relation_loss), which have no width, or project the student's states first."
        )
    s, t = _full(student), _full(teacher.detach())
    each = (s - t).square().mean(-1) if kind == "mse" else 1 - F.cosine_similarity(s, t, dim=-1)
    return each.mean() if mask is None else _mean(each, mask.bool())


def noise_to_signal(
    student: Tensor, teacher: Tensor, eps: float = 1e-6, mask: Tensor | None = None
) -> Tensor:
    """Squared error of a feature map in units of the teacher's variance, so that all channels count alike.

    ``mean over examples and channels of ( mean (s - t)^2 / var(t) )``, mean and variance over the places.

    Args:
        student: ``(batch, channels, *places)``, or tokens ``(batch, places, channels)``.
        teacher: of the same shape; no gradient flows into it.
        eps: the least variance that is divided by, for channels that are constant.
        mask: of tokens, true where one counts, ``(batch, places)``; None: everywhere.

    Returns:
        A scalar, 1 for a student that says each channel's mean everywhere.

    Raises:
        ValueError: if the shapes differ or have fewer than three dimensions, or the mask does not fit.

    Reference: Wang et al., SpaceEvo, ICCV 2023. Their code divides by the student's variance, which a student
    can raise to please the loss; the teacher's is fixed.
    """
    if student.shape != teacher.shape or student.ndim < 3:
        raise ValueError(
            "noise_to_signal: two maps (batch, channels, *places) or (batch, places, channels) of the same "
            f"shape are needed, got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if mask is not None:
        _check_tokens("noise_to_signal", student, teacher, mask)
    places = (1,) if student.ndim == 3 else tuple(range(2, student.ndim))

    def mean(x: Tensor) -> Tensor:
        if mask is None:
            return x.mean(places, keepdim=True)
        valid = mask.bool().unsqueeze(-1)
        return torch.where(valid, x, 0.0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)

    s, t = _full(student), _full(teacher.detach())
    noise, signal = mean((s - t).square()), mean((t - mean(t)).square())
    return (noise / signal.clamp(min=eps)).mean()


def block_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    layers: Sequence[int] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = noise_to_signal,
) -> Tensor:
    """Each block of the student against one of the teacher's: the mean of their losses.

    Args:
        student: outputs of its blocks, in order.
        teacher: outputs of the teacher's blocks.
        layers: for each block of the student the index of the teacher's; None: the same, of as many blocks.
        loss: of a student's and the teacher's output.

    Raises:
        ValueError: if the blocks cannot be paired.

    Reference: Li et al., DNA, CVPR 2020, section 3.2; the loss is that of SpaceEvo.
    """
    if layers is None and len(student) != len(teacher):
        raise ValueError(
            f"block_loss: {len(student)} blocks of the student and {len(teacher)} of the teacher; say which "
            "belong together with layers=, one index of the teacher's for each of the student's."
        )
    pairs = range(len(teacher)) if layers is None else layers
    if not student or len(pairs) != len(student) or not all(-len(teacher) <= k < len(teacher) for k in pairs):
        raise ValueError(
            f"block_loss: layers must give each of the {len(student)} blocks of the student (at least one) "
            f"one of the teacher's {len(teacher)}, got {list(pairs)}."
        )
    return torch.stack([loss(s, teacher[k]) for s, k in zip(student, pairs, strict=True)]).mean()


def _scores(x: Tensor, heads: int) -> Tensor:
    size = x.shape[-1] // heads
    cut: Tensor = _full(x)[..., : size * heads].unflatten(-1, (heads, size)).transpose(1, 2)
    with torch.autocast(x.device.type, enabled=False):  # it would multiply in half precision
        return cut @ cut.transpose(-1, -2) / math.sqrt(size)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    valid = valid.expand_as(values)
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def _full(x: Tensor) -> Tensor:
    """At least single precision: squares and exponentials of half-precision numbers overflow early."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_tokens(where: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2] or teacher.ndim != 3:
        raise ValueError(
            f"{where}: two tensors (batch, tokens, width) of the same tokens are needed, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if mask is not None and mask.shape != student.shape[:2]:
        raise ValueError(
            f"{where}: mask must have shape {tuple(student.shape[:2])} (batch, tokens), true where a token "
            f"counts, got {tuple(mask.shape)}."
        )
