"""What a student learns from a teacher: losses on logits or features, and rules that combine them.

All losses are means over the batch, and the teacher's side is always detached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nas.registry import Registry

__all__ = [
    "Both",
    "InstaTuneLoss",
    "OutputReader",
    "StudentLoss",
    "Task",
    "Teacher",
    "normalized_mse",
    "read_output",
    "soft_cross_entropy",
    "soft_kl",
    "student_loss_named",
    "student_losses",
]

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


def read_output(output: Any) -> Tensor:
    """The tensor to distil in whatever a network returned.

    A tensor itself; ``.logits`` or ``["logits"]``; else the first floating tensor of a tuple, list, mapping
    or dataclass, in its own order.

    Raises:
        TypeError: if there is none; a function given as ``output=`` reads what is not plain.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    for item in _items(output):
        if isinstance(item, Tensor) and item.is_floating_point():
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


# --- rules: from a student's pass to its loss


@runtime_checkable
class StudentLoss(Protocol):
    """What a student learns from.

    ``needs_task``: whether the user's ``training_step`` runs once more for each student, to give ``task``.
    ``needs_teacher``: whether outputs are compared; if not, ``student`` and ``teacher`` are not read.
    ``strong_teacher``: a frozen network, or ``None``.
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
            student: the student's logits or features, ``(batch, ..., classes)``.
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
    """The student learns from the largest network alone (in-place distillation).

    Args:
        temperature: of the softmax, above 0.

    Reference: Yu et al., BigNAS, ECCV 2020, section 3.2.
    """

    temperature: float = 1.0
    needs_task = False
    needs_teacher = True

    def __call__(
        self, student: Tensor, teacher: Tensor, *, task: Tensor | None, strong: Tensor | None, features: bool
    ) -> Tensor:
        """Soft cross-entropy, or the normalised squared distance of features."""
        return _distance(student, teacher, self.temperature, features)


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
    """

    temperature: float = 1.0
    weight: float = 0.5
    needs_task = True
    needs_teacher = True

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"Both: weight must be in [0, 1], got {self.weight}.")

    def __call__(
        self, student: Tensor, teacher: Tensor, *, task: Tensor | None, strong: Tensor | None, features: bool
    ) -> Tensor:
        """``weight * task + (1 - weight) * distance to the teacher``."""
        assert task is not None  # needs_task: the caller gives it
        return self.weight * task + (1 - self.weight) * _distance(
            student, teacher, self.temperature, features
        )


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
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"InstaTuneLoss: alpha must be in [0, 1], got {self.alpha}.")

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
