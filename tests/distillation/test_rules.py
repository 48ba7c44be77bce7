from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from lightning_nas.distillation import (
    Both,
    InstaTuneLoss,
    Task,
    Teacher,
    normalized_mse,
    read_output,
    soft_cross_entropy,
    soft_kl,
    student_loss_named,
    student_losses,
)

S, S_I, T = (torch.tensor([row], dtype=torch.float64) for row in ([2.0, 0, -1], [1, 0.5, -0.5], [3, -1, -1]))


def logits(seed, shape=(5, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def numpy_kl(student, teacher, temperature):
    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(-1).mean(), -(temperature**2) * (p * np.log(q)).sum(
        -1
    ).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_soft_losses_equal_their_formulas(temperature, shape):
    student, teacher = logits(0, shape), logits(1, shape)
    kl, cross_entropy = numpy_kl(student, teacher, temperature)
    assert soft_kl(student, teacher, temperature).item() == pytest.approx(kl, rel=1e-12)
    assert soft_cross_entropy(student, teacher, temperature).item() == pytest.approx(cross_entropy, rel=1e-12)


@pytest.mark.parametrize("loss", [soft_kl, soft_cross_entropy])
def test_the_gradient_of_soft_losses_is_the_difference_of_the_distributions(loss):
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    loss(student, teacher).backward()
    expected = (student.softmax(-1) - teacher.softmax(-1)).detach() / len(student)
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


def test_soft_kl_of_instatune_agrees_with_the_golden_values():
    assert soft_kl(S_I, S).item() == pytest.approx(0.199976688, abs=1e-9)
    assert soft_kl(S, T).item() == pytest.approx(0.080864454, abs=1e-9)
    assert soft_kl(S_I, T).item() == pytest.approx(0.462143774, abs=1e-9)


@pytest.mark.parametrize(
    ("temperature", "strong", "golden"),
    [
        (1.0, False, 0.372176669),
        (1.0, True, 0.612298747),
        (2.0, False, 0.423933916),
        (2.0, True, 1.121043871),
    ],
)
def test_instatune_loss_of_a_step_agrees_with_the_golden_values(temperature, strong, golden):
    rule, label = InstaTuneLoss(alpha=0.3, temperature=temperature), torch.tensor([0])
    cross_entropy = torch.nn.functional.cross_entropy
    step = rule.largest_weight * cross_entropy(S, label)
    if strong:
        step = step + rule.largest_extra(S, T)
    step = step + rule(S_I, S, task=cross_entropy(S_I, label), strong=T if strong else None, features=False)
    assert step.item() == pytest.approx(golden, abs=1e-8)


def test_instatune_gradients_agree_with_the_golden_values():
    largest, student = S.clone().requires_grad_(), S_I.clone().requires_grad_()
    rule, cross_entropy, label = (
        InstaTuneLoss(alpha=0.3),
        torch.nn.functional.cross_entropy,
        torch.tensor([0]),
    )
    task = cross_entropy(student, label)
    loss = rule.largest_weight * cross_entropy(largest, label)
    (loss + rule(student, largest.detach(), task=task, strong=None, features=False)).backward()
    torch.testing.assert_close(
        largest.grad,
        torch.tensor([[-0.046861580, 0.034258559, 0.012603021]], dtype=torch.float64),
        atol=1e-8,
        rtol=0,
    )
    torch.testing.assert_close(
        student.grad,
        torch.tensor([[-0.344106932, 0.251562325, 0.092544607]], dtype=torch.float64),
        atol=1e-8,
        rtol=0,
    )


def test_one_logit_is_that_of_a_sigmoid():
    student, teacher = logits(0, (6, 1)).requires_grad_(), logits(1, (6, 1))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    torch.testing.assert_close(soft_cross_entropy(student, teacher), expected)
    soft_kl(student, teacher).backward()
    torch.testing.assert_close(student.grad, (student.sigmoid() - teacher.sigmoid()).detach() / 6)


def test_normalized_mse_is_twice_one_minus_the_cosine():
    student, teacher = logits(0).float(), logits(1).float()
    cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    torch.testing.assert_close(normalized_mse(student, teacher), (2 - 2 * cosine).mean())
    torch.testing.assert_close(normalized_mse(7 * student, teacher), normalized_mse(student, teacher))


def test_named_rules_mix_the_task_and_the_teacher():
    student, teacher, task = logits(0), logits(1), torch.tensor(0.7, dtype=torch.float64)
    distance = soft_cross_entropy(student, teacher, 2.0)
    given = {"task": task, "strong": None, "features": False}
    assert Teacher(2.0)(student, teacher, **given) == distance
    assert Task()(student, teacher, **given) == task
    torch.testing.assert_close(
        Both(2.0, weight=0.25)(student, teacher, **given), 0.25 * task + 0.75 * distance
    )
    assert Teacher()(student, teacher, **{**given, "features": True}) == normalized_mse(student, teacher)


Pair = namedtuple("Pair", "ids scores")


@dataclass
class WithLogits:
    loss: torch.Tensor
    logits: torch.Tensor


def test_logits_are_found_in_what_networks_return():
    wanted, ids = torch.randn(2, 3), torch.tensor([1, 2])
    for output in [
        wanted,
        WithLogits(torch.tensor(0.5), wanted),
        {"loss": torch.tensor(0.5), "logits": wanted},
        (ids, wanted, torch.zeros(1)),
        [wanted],
        Pair(ids, wanted),
        {"hidden": wanted},
    ]:
        assert read_output(output) is wanted


def test_the_two_ends_of_an_answer_are_read_as_two_distributions_over_tokens():
    start, end = torch.randn(2, 5), torch.randn(2, 5)
    output = QuestionAnsweringModelOutput(loss=torch.tensor(0.5), start_logits=start, end_logits=end)
    by_hand = [soft_cross_entropy(one.flip(0), one) for one in (start, end)]
    student = QuestionAnsweringModelOutput(start_logits=start.flip(0), end_logits=end.flip(0))
    loss = soft_cross_entropy(read_output(student), read_output(output))
    torch.testing.assert_close(loss, (by_hand[0] + by_hand[1]) / 2)


def test_a_loss_among_the_outputs_is_not_taken_for_logits():
    features = torch.randn(2, 3)
    assert read_output({"loss": torch.tensor(0.5), "features": features}) is features
    assert read_output((torch.tensor(0.5), features)) is features


def test_an_output_without_logits_names_the_remedy():
    with pytest.raises(TypeError, match="NoneType.*output="):
        read_output(None)


def test_shapes_and_temperatures_that_cannot_be_right_are_refused():
    with pytest.raises(ValueError, match=r"same shape, got \(5, 4\) and \(5, 3\)"):
        soft_kl(logits(0), logits(0, (5, 3)))
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        soft_cross_entropy(logits(0), logits(0), 0)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        InstaTuneLoss(alpha=2)


def test_rules_are_found_by_name_and_users_add_their_own():
    assert student_loss_named("both", 3.0) == Both(3.0)
    with pytest.raises(ValueError, match="Unknown student loss 'techer'. Did you mean 'teacher'?"):
        student_loss_named("techer")
    with pytest.raises(TypeError, match="students_learn_from must be one of"):
        student_loss_named(3)
    assert {"teacher", "task", "both", "instatune"} <= set(student_losses)
