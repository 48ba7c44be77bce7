"""What a student learns from a teacher: losses on logits or features, and rules that combine them.

All losses are means over the batch, and the teacher's side is always detached.
"""

from lightning_nas.distillation.features import (
    block_loss,
    hidden_state_loss,
    noise_to_signal,
    qkv_relation_loss,
    relation_loss,
)
from lightning_nas.distillation.inside import HiddenStates, Relations, tap_names
from lightning_nas.distillation.logits import (
    OutputReader,
    normalized_mse,
    read_output,
    soft_cross_entropy,
    soft_kl,
    vote,
)
from lightning_nas.distillation.rules import (
    Both,
    InstaTuneLoss,
    StudentLoss,
    Task,
    Teacher,
    student_loss_named,
    student_losses,
)

__all__ = [
    "Both",
    "HiddenStates",
    "InstaTuneLoss",
    "OutputReader",
    "Relations",
    "StudentLoss",
    "Task",
    "Teacher",
    "block_loss",
    "hidden_state_loss",
    "noise_to_signal",
    "normalized_mse",
    "qkv_relation_loss",
    "read_output",
    "relation_loss",
    "soft_cross_entropy",
    "soft_kl",
    "student_loss_named",
    "student_losses",
    "tap_names",
    "vote",
]
