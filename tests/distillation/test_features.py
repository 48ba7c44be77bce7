import numpy as np
import pytest
import torch

from lightning_nas.distillation import (
    block_loss,
    hidden_state_loss,
    noise_to_signal,
    qkv_relation_loss,
    relation_loss,
)

KINDS = ["mse_softmax", "mse_scores", "kl"]


def states(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])


def relation_by_loops(student, teacher, heads, kind, mask):
    """One example, head, query and key at a time."""
    cells, rows = [], []
    for example in range(len(student)):
        valid = [i for i in range(student.shape[1]) if mask[example, i]]
        for head in range(heads):
            scores = []
            for x in (student, teacher):
                d = x.shape[-1] // heads
                tokens = x[example, valid, head * d : (head + 1) * d].numpy()
                scores.append(np.array([[a @ b / np.sqrt(d) for b in tokens] for a in tokens]))
            r_student, r_teacher = (np.exp(s) / np.exp(s).sum(1, keepdims=True) for s in scores)
            pair = scores if kind == "mse_scores" else (r_student, r_teacher)
            cells += list(((pair[0] - pair[1]) ** 2).ravel())
            rows += list((r_teacher * np.log(r_teacher / r_student)).sum(1))
    return np.mean(rows if kind == "kl" else cells)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_relations_equal_a_loop_over_examples_heads_and_positions(kind, masked):
    student, teacher = states(0, 2, 5, 10), states(1, 2, 5, 14)  # remainders of 1 and 2 are dropped
    got = relation_loss(student, teacher, 3, kind, MASK if masked else None)
    expected = relation_by_loops(student, teacher, 3, kind, MASK if masked else torch.ones_like(MASK))
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "golden"), [("mse_softmax", 0.014409492), ("mse_scores", 0.375), ("kl", 0.029399903)]
)
def test_relations_agree_with_the_golden_values_of_autodistil(kind, golden):
    teacher = torch.eye(2, dtype=torch.float64)[None]
    student = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    assert relation_loss(student, teacher, 1, kind).item() == pytest.approx(golden, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_relations_do_not_see_a_rotation_inside_a_head_nor_the_remainder(kind):
    student, teacher = states(0, 2, 5, 10), states(1, 2, 5, 12)
    rotations = torch.block_diag(
        *(torch.linalg.qr(states(seed, 3, 3))[0] for seed in range(3)), torch.ones(1)
    )
    changed = student @ rotations
    changed[..., 9] = 100.0
    expected = relation_loss(student, teacher, 3, kind)
    torch.testing.assert_close(relation_loss(changed, teacher, 3, kind), expected)
    assert relation_loss(teacher, teacher, 3, kind).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_neither_counts_nor_learns_whatever_it_holds(kind):
    student, teacher = states(0, 2, 5, 8), states(1, 2, 5, 12)
    expected = relation_loss(student, teacher, 2, kind, MASK)
    spoilt = torch.where(MASK[..., None].bool(), student, torch.tensor(1e3)).requires_grad_()
    got = relation_loss(spoilt, teacher, 2, kind, MASK)
    torch.testing.assert_close(got, expected)
    got.backward()
    assert (spoilt.grad[MASK == 0] == 0).all()
    assert (spoilt.grad[MASK == 1] != 0).any()
    longer = [torch.cat([x, states(9, 2, 3, x.shape[-1])], 1) for x in (student, teacher)]
    mask = torch.cat([MASK, torch.zeros(2, 3)], 1)
    torch.testing.assert_close(relation_loss(*longer, 2, kind, mask), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_relation_gradients_are_finite_differences_and_the_teacher_has_none(kind):
    student, teacher = states(0, 1, 3, 4).requires_grad_(), states(1, 1, 3, 6).requires_grad_()
    mask = torch.tensor([[1, 1, 0]])
    assert torch.autograd.gradcheck(lambda x: relation_loss(x, teacher, 2, kind, mask), student)
    relation_loss(student, teacher, 2, kind).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_token_that_counts_teaches_nothing(kind):
    student = states(0, 2, 5, 8).requires_grad_()
    loss = relation_loss(student, states(1, 2, 5, 8), 2, kind, torch.zeros(2, 5))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_half_precision_relations_are_computed_in_single():
    student, teacher = states(0, 2, 5, 8), states(1, 2, 5, 8)
    half = relation_loss((300 * student).half(), (300 * teacher).half(), 2, "mse_scores")
    assert half.dtype == torch.float32
    expected = relation_loss(
        (300 * student).half().double(), (300 * teacher).half().double(), 2, "mse_scores"
    )
    torch.testing.assert_close(half.double(), expected)


def test_the_three_relations_are_a_weighted_sum():
    student, teacher = [states(i, 2, 5, 8) for i in range(3)], [states(10 + i, 2, 5, 12) for i in range(3)]
    one = [relation_loss(s, t, 4, "kl", MASK) for s, t in zip(student, teacher, strict=True)]
    got = qkv_relation_loss(student, teacher, 4, "kl", MASK, weights=(1.0, 0.5, 2.0))
    torch.testing.assert_close(got, one[0] + 0.5 * one[1] + 2 * one[2])


def test_hidden_states_are_compared_token_by_token():
    student, teacher = states(0, 2, 5, 6), states(1, 2, 5, 6)
    valid = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    squares = np.mean([((student[c] - teacher[c]) ** 2).mean() for c in valid])
    cosines = np.mean([1 - student[c] @ teacher[c] / student[c].norm() / teacher[c].norm() for c in valid])
    assert hidden_state_loss(student, teacher, "mse", MASK).item() == pytest.approx(squares, rel=1e-12)
    assert hidden_state_loss(student, teacher, "cosine", MASK).item() == pytest.approx(cosines, rel=1e-12)
    assert hidden_state_loss(student, teacher).item() == pytest.approx(
        ((student - teacher) ** 2).mean().item()
    )


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 20, 3)])  # a map of channels, and tokens
def test_noise_to_signal_is_in_units_of_the_teachers_variance(shape):
    student, teacher = states(0, *shape), 7 * states(1, *shape) + 2
    s, t = (x.reshape(2, 3, 20) if len(shape) == 4 else x.transpose(1, 2) for x in (student, teacher))
    ratios = [
        np.mean((s[i, c] - t[i, c]).numpy() ** 2) / np.var(t[i, c].numpy())
        for i in range(2)
        for c in range(3)
    ]
    assert noise_to_signal(student, teacher).item() == pytest.approx(np.mean(ratios), rel=1e-12)
    torch.testing.assert_close(noise_to_signal(10 * student, 10 * teacher), noise_to_signal(student, teacher))
    dim = (2, 3) if len(shape) == 4 else (1,)
    mean = teacher.mean(dim, keepdim=True).expand_as(teacher)
    assert noise_to_signal(mean, teacher).item() == pytest.approx(1.0)


def test_noise_to_signal_leaves_padding_out():
    student, teacher = states(0, 2, 5, 3), 7 * states(1, 2, 5, 3) + 2
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    each = [
        noise_to_signal(s[m == 1][None], t[m == 1][None])
        for s, t, m in zip(student, teacher, mask, strict=True)
    ]
    assert noise_to_signal(student, teacher, mask=mask).item() == pytest.approx(
        sum(each).item() / 2, rel=1e-12
    )
    with pytest.raises(ValueError, match="noise_to_signal: mask must have shape"):
        noise_to_signal(student, teacher, mask=mask[:, :4])


def test_a_constant_channel_does_not_divide_by_nothing():
    student, teacher = states(0, 2, 3, 4, 4), states(1, 2, 3, 4, 4)
    teacher[:, 1] = 5.0
    assert torch.isfinite(noise_to_signal(student, teacher))


def test_blocks_are_paired_in_order_or_as_told():
    student, teacher = [states(i, 2, 5, 6) for i in range(2)], [states(10 + i, 2, 5, 6) for i in range(3)]
    got = block_loss(student, teacher, layers=(0, -1), loss=hidden_state_loss)
    expected = ((student[0] - teacher[0]) ** 2).mean() / 2 + ((student[1] - teacher[2]) ** 2).mean() / 2
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        block_loss(student, teacher[:2]), sum(map(noise_to_signal, student, teacher[:2])) / 2
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: relation_loss(x, x, 0), "heads must be from 1 to the smaller width, got 0 for widths 6"),
        (lambda x: relation_loss(x, x, 7), "heads must be from 1 to the smaller width, got 7"),
        (
            lambda x: relation_loss(x, x, 2, "mse"),
            "kind must be 'mse_softmax', 'mse_scores' or 'kl', got 'mse'",
        ),
        (
            lambda x: relation_loss(x, x[:, 1:], 2),
            r"of the same tokens are needed, got \(2, 5, 6\) and \(2, 4",
        ),
        (lambda x: relation_loss(x, x, 2, mask=torch.ones(2, 4)), r"mask must have shape \(2, 5\)"),
        (lambda x: qkv_relation_loss([x, x], [x, x], 2), "three, and so are their weights; got 2, 2 and 3"),
        (lambda x: hidden_state_loss(x, x[..., 1:]), "widths differ, 6 and 5. Compare relations"),
        (lambda x: hidden_state_loss(x, x, "l1"), "kind must be 'mse' or 'cosine', got 'l1'"),
        (lambda x: noise_to_signal(x[0], x[0]), "noise_to_signal: two maps"),
        (lambda x: block_loss([x], [x, x]), "1 blocks of the student and 2 of the teacher; say which"),
        (lambda x: block_loss([x, x], [x, x], layers=(0, 2)), r"one of the teacher's 2, got \[0, 2\]"),
        (lambda x: block_loss([], [], layers=()), "at least one"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(states(0, 2, 5, 6))
