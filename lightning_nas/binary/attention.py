"""Attention between codes: what runs between the projections of a transformer's attention.

Each module takes queries, keys and values and gives their context. Products are of codes, exact, and scales
follow; softmax stays real.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_nas.binary.products import binary_matmul
from lightning_nas.estimators import STE, Elastic, straight_through
from lightning_nas.registry import Registry

__all__ = [
    "BiPFTAttention",
    "BiTAttention",
    "BiViTAttention",
    "CodedAttention",
    "attentions",
    "row_scale",
    "softmax_aware",
]


def softmax_aware(probabilities: Tensor, threshold: float = 0.25) -> Tensor:
    """1 where a probability is at least a share of the largest in its row, else 0; backward, the identity.

    Rows of a softmax are long-tailed: a threshold of 1/2 for all would leave most of them empty.

    Args:
        probabilities: ``(..., keys)``, at least 0; a row's largest is above 0.
        threshold: share of the row's largest, in (0, 1].

    Raises:
        ValueError: if ``threshold`` is out of range.

    Reference: He et al., BiViT, ICCV 2023, section 3.2 (softmax-aware binarization).
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"softmax_aware: threshold must be in (0, 1], got {threshold}.")
    rows = probabilities.detach()
    kept = rows >= threshold * rows.amax(-1, keepdim=True)
    return straight_through(probabilities, kept.to(probabilities.dtype), None)


def row_scale(probabilities: Tensor, codes: Tensor) -> Tensor:
    """The scale of each row with the least squared error: the mean of the probabilities that are kept.

    Args:
        probabilities: ``(..., keys)``.
        codes: 0 and 1, same shape, at least one 1 in a row.

    Returns:
        ``(..., 1)``.
    """
    return (probabilities * codes).sum(-1, keepdim=True) / codes.sum(-1, keepdim=True)


class CodedAttention(nn.Module):
    """What runs between the projections of an attention, with codes.

    Args:
        width: of the network's tokens.

    Attributes:
        is_on: whether codes are in force; else the attention is the real one, as in schedules of several
            steps.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.is_on = width, True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        factor: float,
        added: Tensor | None = None,
        dropout: float = 0.0,
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Context, and the probabilities that it is made of.

        Args:
            query: ``(batch, heads, queries, d)``.
            key: ``(batch, heads, keys, d)``.
            value: ``(batch, heads, keys, d)``.
            factor: what scores are multiplied with, as ``d ** -0.5``.
            added: to the scores: a mask of 0 and large negative numbers, a position bias; broadcasts.
            dropout: of the probabilities, in training.
            tokens: ``(batch, keys, width)``, what the projections were made of.

        Returns:
            ``(batch, heads, queries, d)`` and ``(batch, heads, queries, keys)``.
        """
        if not self.is_on:
            scores = query @ key.mT * factor
            weights = F.softmax(scores if added is None else scores + added, -1)
            weights = F.dropout(weights, dropout, self.training)
            return weights @ value, weights
        scores = self.scores(query, key, tokens) * factor
        probabilities = F.softmax(scores if added is None else scores + added, -1)
        codes, scale = self.codes(probabilities)
        if dropout and self.training:
            codes = codes * (torch.rand_like(codes) >= dropout).to(codes.dtype)
            scale = scale / (1 - dropout)
        return self.context(codes, scale, value, tokens).to(value.dtype), codes * scale

    def scores(self, query: Tensor, key: Tensor, tokens: Tensor | None) -> Tensor:
        """Queries times keys, before any factor, ``(batch, heads, queries, keys)``."""
        raise NotImplementedError

    def codes(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """0 and 1 for each probability, and what they are multiplied with, which broadcasts against them."""
        raise NotImplementedError

    def context(self, codes: Tensor, scale: Tensor, value: Tensor, tokens: Tensor | None) -> Tensor:
        """Coded probabilities times values."""
        raise NotImplementedError


attentions: Registry[type[CodedAttention]] = Registry("binary attention")


@attentions.register("bivit")
class BiViTAttention(CodedAttention):
    """Signs of queries, keys and values, and softmax-aware codes of the probabilities.

    Args:
        width: of the network's tokens.
        threshold: see :func:`softmax_aware`.
        is_scaled: whether each row of codes has its least-squares scale; the authors' code has none.

    Reference: He et al., BiViT, ICCV 2023, sections 3.1 and 3.2.
    """

    def __init__(self, width: int, threshold: float = 0.25, is_scaled: bool = False) -> None:
        super().__init__(width)
        softmax_aware(torch.ones(1), threshold)  # refuses what is out of range
        self.threshold, self.is_scaled, self.signs = threshold, is_scaled, STE()

    @override
    def scores(self, query: Tensor, key: Tensor, tokens: Tensor | None) -> Tensor:
        return binary_matmul(self.signs(query), self.signs(key).mT)

    @override
    def codes(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        codes = softmax_aware(probabilities, self.threshold)
        if self.is_scaled:
            return codes, row_scale(probabilities, codes.detach())
        return codes, codes.new_ones(())

    @override
    def context(self, codes: Tensor, scale: Tensor, value: Tensor, tokens: Tensor | None) -> Tensor:
        return binary_matmul(codes, self.signs(value)) * scale

    @override
    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, is_scaled={self.is_scaled}"


@attentions.register("bit")
class BiTAttention(CodedAttention):
    """Elastic codes with learned scales: -1 and +1 of queries, keys and values, 0 and 1 of probabilities.

    Reference: Liu et al., BiT, NeurIPS 2022, section 3.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.query, self.key, self.value = Elastic(), Elastic(), Elastic()
        self.probability = Elastic(signed=False)

    @override
    def scores(self, query: Tensor, key: Tensor, tokens: Tensor | None) -> Tensor:
        product = binary_matmul(self.query(query), self.key(key).mT)
        return product * (self.query.scale * self.key.scale)

    @override
    def codes(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        return self.probability(probabilities), self.probability.scale

    @override
    def context(self, codes: Tensor, scale: Tensor, value: Tensor, tokens: Tensor | None) -> Tensor:
        return binary_matmul(codes, self.value(value)) * (scale * self.value.scale)


@attentions.register("bipft")
class BiPFTAttention(BiTAttention):
    """BiT's attention, and estimates of what its codes leave out, of rank one, the same for all heads.

    Of each token five numbers are learned: ``qm`` and ``km`` stand for its codes, ``qp``, ``kp`` and ``vp``
    for what they leave of query, key and value. Scores gain ``qm kp' + qp km' + qp kp'``, the context
    ``probabilities @ vp``. The last three start at 0, so that the layer starts as BiT's.

    Reference: Xing et al., BiPFT, AAAI 2024, section 3.3 (low-rank estimators of the residual polynomials).
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.qm, self.km = nn.Linear(width, 1), nn.Linear(width, 1)
        self.qp, self.kp, self.vp = nn.Linear(width, 1), nn.Linear(width, 1), nn.Linear(width, 1)
        for residual in (self.qp, self.kp, self.vp):
            nn.init.zeros_(residual.weight)
            nn.init.zeros_(residual.bias)

    @override
    def scores(self, query: Tensor, key: Tensor, tokens: Tensor | None) -> Tensor:
        assert tokens is not None  # whoever owns the projections gives what they were made of
        qm, km, qp, kp = (part(tokens) for part in (self.qm, self.km, self.qp, self.kp))
        residual: Tensor = qm @ kp.mT + qp @ (km + kp).mT
        return super().scores(query, key, tokens) + residual[:, None]

    @override
    def context(self, codes: Tensor, scale: Tensor, value: Tensor, tokens: Tensor | None) -> Tensor:
        assert tokens is not None
        residual: Tensor = (codes * scale) @ self.vp(tokens)[:, None].to(codes.dtype)
        return super().context(codes, scale, value, tokens) + residual
