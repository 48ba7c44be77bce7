import numpy as np
import pytest
import torch

from lightning_nas.distillation import soft_kl, vote


def logits(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_mean_vote_is_the_mean_of_the_teachers_probabilities(temperature):
    teachers = [logits(seed, 5, 4) for seed in range(3)]
    by_hand = sum(np.exp(t.numpy() / temperature) / np.exp(t.numpy() / temperature).sum(-1, keepdims=True)
                  for t in teachers) / 3  # fmt: skip
    got = (vote(teachers, temperature) / temperature).softmax(-1)
    torch.testing.assert_close(got, torch.from_numpy(by_hand))


def test_a_majority_vote_is_certain_and_a_tie_is_the_mean():
    a, b, c = (torch.eye(3, dtype=torch.float64)[i] * 5 for i in range(3))
    teachers = [torch.stack([a, a]), torch.stack([a, b]), torch.stack([b, c])]  # agreed; a three-way tie
    got = vote(teachers, rule="majority").softmax(-1)
    expected = torch.stack([torch.tensor([1.0, 0, 0], dtype=torch.float64), torch.full((3,), 1 / 3)])
    torch.testing.assert_close(got, expected.double(), rtol=0, atol=1e-7)
    student = logits(3, 2, 3).requires_grad_()
    soft_kl(student, vote(teachers, rule="majority")).backward()  # -inf where a class has no chance
    torch.testing.assert_close(student.grad, (student.softmax(-1) - got).detach() / 2)


def test_one_teacher_speaks_for_himself_and_equal_networks_pull_nowhere():
    teacher = logits(0, 5, 4).requires_grad_()
    assert torch.equal(vote([teacher]), teacher)
    assert not vote([teacher]).requires_grad
    student = teacher.detach().clone().requires_grad_()
    loss = soft_kl(student, vote([teacher], 2.0), 2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-15
    assert student.grad.abs().max() < 1e-15


def test_one_logit_votes_as_a_sigmoid():
    teachers = [logits(seed, 6, 1) for seed in range(3)]
    expected = sum(t.sigmoid() for t in teachers) / 3
    torch.testing.assert_close(vote(teachers).sigmoid(), expected)


def test_votes_that_cannot_be_counted_are_refused():
    with pytest.raises(ValueError, match="at least one teacher"):
        vote([])
    with pytest.raises(ValueError, match="rule must be 'mean' or 'majority', got 'median'"):
        vote([logits(0, 2, 3)], rule="median")
    with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(2, 4\)"):
        vote([logits(0, 2, 3), logits(0, 2, 4)])
