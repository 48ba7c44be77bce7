"""Rules by which a student also learns from what the largest network holds inside, not from its output alone.

A rule with ``taps`` names modules by shell patterns. It then gets their outputs by name, of the student and
of the teacher, as ``student_taps`` and ``teacher_taps``, and ``mask``, true where a token counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_nas.distillation.features import (
    RelationKind,
    hidden_state_loss,
    noise_to_signal,
    qkv_relation_loss,
)
from lightning_nas.distillation.rules import Both, StudentLoss

__all__ = ["HiddenStates", "Relations", "tap_names"]


def tap_names(names: Iterable[str], pattern: str) -> list[str]:
    """The outermost modules that match a shell pattern, in the order given.

    ``*`` crosses dots, and a pattern may leave out how a name begins: ``"layer.*"`` finds
    ``"bert.encoder.layer.0"`` and the other layers, and not what is inside them.
    """
    matched = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
    outer: list[str] = []
    for name in matched:
        if not any(name != other and name.startswith(f"{other}.") for other in matched):
            outer.append(name)
    return outer


@dataclass(frozen=True, kw_only=True)
class _Inside:
    """What both rules share: they add to another rule's loss, and ask of it what that rule asks."""

    weight: float = 1.0
    then: StudentLoss = field(default_factory=Both)
    needs_teacher = True

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"{type(self).__name__}: weight must be at least 0, got {self.weight}.")

    @property
    def needs_task(self) -> bool:
        return self.then.needs_task

    @property
    def strong_teacher(self) -> nn.Module | None:
        return getattr(self.then, "strong_teacher", None)

    @property
    def largest_weight(self) -> float:
        return getattr(self.then, "largest_weight", 1.0)

    @property
    def largest_extra(self) -> Any:  # a method of the other rule, or None
        return getattr(self.then, "largest_extra", None)

    @property
    def patterns(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def taps(self) -> tuple[str, ...]:
        """Patterns of the modules whose outputs are needed."""
        return (*self.patterns, *getattr(self.then, "taps", ()))

    def distance(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mask: Tensor | None
    ) -> Tensor | None:
        raise NotImplementedError

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        task: Tensor | None,
        strong: Tensor | None,
        features: bool,
        student_taps: Mapping[str, Tensor],
        teacher_taps: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """The loss of ``then`` plus ``weight`` times the distance inside."""
        more: dict[str, Any] = {"student_taps": student_taps, "teacher_taps": teacher_taps, "mask": mask}
        loss: Tensor = self.then(
            student,
            teacher,
            task=task,
            strong=strong,
            features=features,
            **(more if hasattr(self.then, "taps") else {}),
        )
        distance = self.distance(student_taps, teacher_taps, mask)
        return loss if distance is None else loss + self.weight * distance


@dataclass(frozen=True)
class HiddenStates(_Inside):
    """The student's hidden states are drawn to those of the largest network, layer by layer.

    Adds ``weight`` times the mean distance over the layers that the student keeps to the loss of ``then``.
    The largest network's states are kept, detached, until the students of the step are done: memory for one
    output of each layer.

    Args:
        layers: shell pattern over names of the network's modules; the outermost that match. Their outputs are
            tensors, or tuples that begin with one, ``(batch, tokens, width)``.
        kind: ``"mse"`` or ``"cosine"`` (see ``hidden_state_loss``), or ``"nsr"``, the mean square in units of
            the teacher's variance (see ``noise_to_signal``), for feature maps too.
        weight: at least 0.
        then: the rule for the outputs.

    Reference: Jiao et al., TinyBERT, Findings of EMNLP 2020; ``"nsr"``: Wang et al., SpaceEvo, ICCV 2023.
    """

    layers: str
    kind: Literal["mse", "cosine", "nsr"] = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("mse", "cosine", "nsr"):
            raise ValueError(f"HiddenStates: kind must be 'mse', 'cosine' or 'nsr', got {self.kind!r}.")

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of the layers."""
        return (self.layers,)

    def distance(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mask: Tensor | None
    ) -> Tensor | None:
        """The mean over the layers that both have; None if there is none."""
        losses = [
            self._between(student[name], teacher[name], mask)
            for name in tap_names(teacher, self.layers)
            if name in student
        ]
        return torch.stack(losses).mean() if losses else None

    def _between(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.shape != teacher.shape[:2]:
            mask = None  # it is of other tokens: of the text alone, where states of an image come behind it
        if self.kind == "nsr":
            return noise_to_signal(student, teacher, mask=mask)
        return hidden_state_loss(student, teacher, self.kind, mask)


@dataclass(frozen=True)
class Relations(_Inside):
    """The student's tokens relate to each other as the largest network's do, in one layer's attention.

    Adds ``weight`` times the sum of the three relation losses to the loss of ``then``. Widths and heads of
    student and teacher may differ, so it works where hidden states cannot be compared. The largest network's
    queries, keys and values of all layers are kept, detached, until its students of the step are done.

    Args:
        query: shell pattern over names of the network's modules, one a layer.
        key: likewise.
        value: likewise.
        fused: pattern of modules that give all three at once, in this order (timm's ``"*qkv"``); in place of
            the three.
        heads: relation heads; the paper takes the teacher's attention heads.
        layer: of the largest network, by index among those that match. A negative one counts from the end, in
            the student among the layers that it keeps: -1 is the last of each. One from the start that the
            student drops is passed over.
        kind: of the distance, see ``relation_loss``.
        weight: at least 0.
        then: the rule for the outputs.

    Reference: Xu et al., AutoDistil, NeurIPS 2022, equation 4.
    """

    query: str = "*query"
    key: str = "*key"
    value: str = "*value"
    fused: str | None = None
    heads: int = 12
    layer: int = -1
    kind: RelationKind = "mse_softmax"

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of the modules that give queries, keys and values."""
        return (self.query, self.key, self.value) if self.fused is None else (self.fused,)

    def distance(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mask: Tensor | None
    ) -> Tensor | None:
        """The sum of the three; None where the student drops the layer."""
        students, teachers = [], []
        for pattern in self.patterns:
            names = tap_names(teacher, pattern)
            kept = [name for name in names if name in student]
            if not -len(names) <= self.layer < len(names):
                raise ValueError(
                    f"Relations: layer={self.layer}, but {len(names)} modules match {pattern!r}; give an "
                    "index among them."
                )
            theirs = names[self.layer]
            if self.layer >= 0:
                own = theirs if theirs in student else None
            else:
                own = kept[self.layer] if -self.layer <= len(kept) else None
            if own is None:
                return None
            students.append(student[own])
            teachers.append(teacher[theirs])
        if self.fused is not None:
            students, teachers = (list(both[0].chunk(3, dim=-1)) for both in (students, teachers))
        return qkv_relation_loss(students, teachers, self.heads, self.kind, mask)
