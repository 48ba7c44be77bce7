"""Rules: from a student's pass to its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from lightning_nas.distillation.logits import normalized_mse, soft_cross_entropy, soft_kl
from lightning_nas.registry import Registry

__all__ = [
    "Both",
    "InstaTuneLoss",
    "StudentLoss",
    "Task",
    "Teacher",
    "student_loss_named",
    "student_losses",
]


@runtime_checkable
class StudentLoss(Protocol):
    """What a student learns from.

    ``needs_task``: whether the user's ``training_step`` runs once more for each student, to give ``task``.
    ``needs_teacher``: whether outputs are compared; if not, ``student`` and ``teacher`` are not read.
    ``strong_teacher``: a frozen network, or ``None``.
    ``taps``, where a rule has it: shell patterns over the names of the network's modules, as in
    :class:`HiddenStates`; the rule is then also given ``student_taps``, ``teacher_taps`` and ``mask``.
    """

    needs_task: bool
    needs_teacher: bool

    def __call__(
        self, student: Tensor, teacher: Tensor, *, task: Tensor | None, strong: Tensor | None, features: bool
    ) -> (
        Any
    ):  # a Tensor; jsonargparse takes a protocol whose call returns a class for a factory of that class
        """The loss of one student, a scalar.

        Args:
            student: the student's logits or features, ``(batch, ..., classes)``; where the callback knows the
                padding of outputs token by token, ``(tokens that count, classes)``.
            teacher: of the largest network for the same input, same shape, detached.
            task: the loss that the user's ``training_step`` gave the student; given if ``needs_task``.
            strong: output of the strong teacher for the same input, where there is one.
            features: whether the tensors are features instead of logits.
        """
        ...


student_losses: Registry[type[StudentLoss]] = Registry("student loss")
"""The rules known by name; users add their own with ``@student_losses.register("name")``."""


def _distance(student: Tensor, teacher: Tensor, temperature: float, features: bool) -> Tensor:
    return normalized_mse(student, teacher) if features else soft_cross_entropy(student, teacher, temperature)


@student_losses.register("teacher")
@dataclass(frozen=True)
class Teacher:
    """The student learns from the largest network alone (in-place distillation), or a frozen one besides.

    Args:
        temperature: of the softmax, above 0.
        strong_teacher: a frozen network that takes what the largest takes and has its classes.
        strong_weight: its share, in [0, 1]; the rest is the largest network's.

    Reference: Yu et al., BigNAS, ECCV 2020, section 3.2.
    """

    temperature: float = 1.0
    strong_teacher: nn.Module | None = None
    strong_weight: float = 0.5
    needs_task = False
    needs_teacher = True

    def __post_init__(self) -> None:
        _check_share("Teacher", "strong_weight", self.strong_weight)

    def __call__(
        self, student: Tensor, teacher: Tensor, *, task: Tensor | None, strong: Tensor | None, features: bool
    ) -> Tensor:
        """Soft cross-entropy, or the normalised squared distance of features."""
        distance = _distance(student, teacher, self.temperature, features)
        if strong is None:
            return distance
        strong_distance = _distance(student, strong, self.temperature, features)
        return (1 - self.strong_weight) * distance + self.strong_weight * strong_distance


@student_losses.register("task")
@dataclass(frozen=True)
class Task:
    """The student learns from the user's own loss alone.

    Args:
        temperature: unused; every rule takes it.
    """

    temperature: float = 1.0
    needs_task = True
    needs_teacher = False

    def __call__(
        self, student: Tensor, teacher: Tensor, *, task: Tensor | None, strong: Tensor | None, features: bool
    ) -> Tensor:
        """The user's loss."""
        assert task is not None  # needs_task: the caller gives it
        return task


@student_losses.register("both")
@dataclass(frozen=True)
class Both:
    """The student learns from the user's own loss and from the largest network.

    Args:
        temperature: of the softmax, above 0.
        weight: share of the user's loss, in [0, 1].
        strong_teacher: a frozen network that takes what the largest takes and has its classes.
        strong_weight: its share of what teachers say, in [0, 1]; the rest is the largest network's.
    """

    temperature: float = 1.0
    weight: float = 0.5
    strong_teacher: nn.Module | None = None
    strong_weight: float = 0.5
    needs_task = True
    needs_teacher = True

    def __post_init__(self) -> None:
        _check_share("Both", "weight", self.weight)
        _check_share("Both", "strong_weight", self.strong_weight)

    def __call__(
        self, student: Tensor, teacher: Tensor, *, task: Tensor | None, strong: Tensor | None, features: bool
    ) -> Tensor:
        """``weight * task + (1 - weight) * distance to the teachers``."""
        assert task is not None  # needs_task: the caller gives it
        taught = Teacher(self.temperature, strong_weight=self.strong_weight)
        distance = taught(student, teacher, task=None, strong=strong, features=features)
        return self.weight * task + (1 - self.weight) * distance


@student_losses.register("instatune")
@dataclass(frozen=True)
class InstaTuneLoss:
    """InstaTune's loss of a step.

    ``alpha [CE(S) + sum_i CE(S_i)] + (1 - alpha) [g KL(S, T) + sum_i ((1 - g) KL(S_i, S) + g KL(S_i, T))]``
    for the largest network S, its students S_i, and the strong teacher T with g = 1 where it is given, else
    g = 0. ``KL(student, teacher)`` is :func:`soft_kl`, with the squared temperature. CE is the loss of the
    user's ``training_step``: the largest network therefore learns with ``alpha`` times his gradient.

    Args:
        alpha: share of the labels, in [0, 1].
        temperature: of the softmax, above 0 (the paper does not print its value).
        strong_teacher: a frozen network that takes what the largest takes and has its classes, usually a
            plainly fine-tuned copy; ``None``: in-place distillation only.

    Reference: Sridhar et al., InstaTune, ICCV 2023 workshops, equation 1.
    """

    alpha: float = 0.3
    temperature: float = 1.0
    strong_teacher: nn.Module | None = None
    needs_task = True
    needs_teacher = True

    def __post_init__(self) -> None:
        _check_share("InstaTuneLoss", "alpha", self.alpha)

    @property
    def largest_weight(self) -> float:
        """What the user's loss of the largest network is multiplied with."""
        return self.alpha

    def largest_extra(self, largest: Tensor, strong: Tensor) -> Tensor:
        """What the largest network learns from the strong teacher, besides the user's loss."""
        return (1 - self.alpha) * soft_kl(largest, strong, self.temperature)

    def __call__(
        self, student: Tensor, teacher: Tensor, *, task: Tensor | None, strong: Tensor | None, features: bool
    ) -> Tensor:
        """``alpha * task + (1 - alpha) * KL`` to the strong teacher, or to the largest without one."""
        assert task is not None  # needs_task: the caller gives it
        target = teacher if strong is None else strong
        distance = normalized_mse(student, target) if features else soft_kl(student, target, self.temperature)
        return self.alpha * task + (1 - self.alpha) * distance


def student_loss_named(
    rule: Literal["teacher", "task", "both"] | str | StudentLoss, temperature: float = 1.0
) -> StudentLoss:
    """The rule of this name at this temperature, or the rule itself.

    Raises:
        ValueError: for an unknown name, or a temperature that is not above 0.
        TypeError: for anything that is neither a name nor a rule.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if isinstance(rule, str):
        return student_losses[rule](temperature=temperature)  # type: ignore[call-arg]  # every named rule takes it
    if not callable(rule) or not hasattr(rule, "needs_task") or not hasattr(rule, "needs_teacher"):
        raise TypeError(
            f"students_learn_from must be one of {', '.join(student_losses)} or a loss object such as "
            f"InstaTuneLoss(alpha=0.3), got {rule!r}."
        )
    return rule


def _check_share(where: str, name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{where}: {name} must be in [0, 1], got {share}.")
