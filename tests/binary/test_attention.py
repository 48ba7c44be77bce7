"""What runs between the projections of an attention, against the formulas of the papers written out again."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_nas.binary import (
    BiPFTAttention,
    BiTAttention,
    BiViTAttention,
    attentions,
    row_scale,
    softmax_aware,
)

BATCH, HEADS, TOKENS, SIZE = 2, 3, 5, 4
FACTOR = SIZE**-0.5


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heads(seed=0):
    return [random(BATCH, HEADS, TOKENS, SIZE, seed=3 * seed + i).requires_grad_() for i in range(3)]


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def as_if(codes, surrogate):
    """The value of one, the gradient of the other."""
    return codes.detach() + surrogate - surrogate.detach()


# --- softmax-aware codes


def test_softmax_aware_codes_keep_what_reaches_a_share_of_its_rows_largest():
    rows = random(40, 7).softmax(-1)
    for threshold in (0.1, 0.25, 0.8):
        expected = [[float(p >= threshold * max(row)) for p in row] for row in rows.tolist()]
        assert softmax_aware(rows, threshold).tolist() == expected


def test_the_threshold_of_a_quarter_is_log_4_below_the_largest_score():
    scores = 3 * random(200, 9, seed=1)
    gap = scores - (scores.amax(-1, keepdim=True) - math.log(4))
    assert gap.abs().min() > 1e-6  # no ties that rounding decides
    assert torch.equal(softmax_aware(scores.softmax(-1)), (gap >= 0).double())


def test_a_threshold_of_1_keeps_the_largest_alone_and_a_tiny_one_keeps_all_that_is_not_masked():
    scores = random(20, 6, seed=2)
    assert torch.equal(softmax_aware(scores.softmax(-1), 1.0), F.one_hot(scores.argmax(-1), 6).double())
    scores[:, 4:] = -torch.inf
    kept = softmax_aware(scores.softmax(-1), 1e-9)
    assert kept[:, :4].all()
    assert not kept[:, 4:].any()


def test_the_scale_of_a_row_has_the_least_squared_error():
    rows = random(6, 8, seed=3).softmax(-1)
    codes = softmax_aware(rows)
    found = row_scale(rows, codes)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    errors = (rows[:, :, None] - codes[:, :, None] * grid).square().sum(1)  # by brute force
    assert (grid[errors.argmin(-1)] - found[:, 0]).abs().max() <= 0.5 / 2000 + 1e-9
    assert ((rows - codes * found).square().sum(1) <= errors.amin(-1) + 1e-12).all()


def test_the_gradient_of_softmax_aware_codes_is_the_softmaxs_own():
    scores = random(4, 6, seed=4).requires_grad_()
    upstream = random(4, 6, seed=5)
    found = torch.autograd.grad(softmax_aware(scores.softmax(-1)), scores, upstream)[0]
    expected = torch.autograd.grad(scores.softmax(-1), scores, upstream)[0]
    torch.testing.assert_close(found, expected)


def test_a_threshold_out_of_range_is_refused():
    for make in (lambda: softmax_aware(torch.ones(2), 1.5), lambda: BiViTAttention(8, threshold=1.5)):
        with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got 1.5"):
            make()


# --- BiViT


def clipped(x):
    return as_if(signs(x), x.clamp(-1, 1))


@pytest.mark.parametrize("is_scaled", [False, True])
def test_bivit_equals_its_formula_and_the_gradient_of_it(is_scaled):
    query, key, value = heads()
    added = random(1, 1, TOKENS, TOKENS, seed=7)
    context, weights = BiViTAttention(12, is_scaled=is_scaled)(query, key, value, FACTOR, added)

    probabilities = (clipped(query) @ clipped(key).mT / math.sqrt(SIZE) + added).softmax(-1)
    kept = (probabilities >= 0.25 * probabilities.amax(-1, keepdim=True)).double()
    codes, scale = as_if(kept, probabilities), 1.0
    if is_scaled:
        scale = (probabilities * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)
    expected = (codes @ clipped(value)) * scale
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(weights, kept * scale)
    upstream = random(*context.shape, seed=8)
    for one, other in zip(
        torch.autograd.grad(context, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
        assert one.abs().sum() > 0


# --- BiT


def elastic(x, scale, low, high):
    """scale * round(clip(x / scale)), with the derivatives of its soft form."""
    if (low, high) == (-1, 1):
        inside = (x.abs() <= scale).double()
        return scale * signs(x) + (x - x.detach()) * inside
    v = (x / scale).clamp(low, high)
    return scale * as_if(v.round(), v)


def with_scales(module):
    """Scales that are not the ones that the first batch gives."""
    for i, part in enumerate((module.query, module.key, module.value)):
        part.size.data.fill_(0.5 + 0.3 * i)
    module.probability.size.data.fill_(0.35)
    for part in (module.query, module.key, module.value, module.probability):
        part.is_started.fill_(True)
    return module.double()


def test_bit_equals_its_formula_and_the_gradient_of_it():
    module, (query, key, value) = with_scales(BiTAttention(12)), heads(1)
    context, _ = module(query, key, value, FACTOR)
    parts = (module.query, module.key, module.value, module.probability)
    scales = [part.size.detach().clone().requires_grad_() for part in parts]
    scores = elastic(query, scales[0], -1, 1) @ elastic(key, scales[1], -1, 1).mT
    probabilities = elastic((scores * FACTOR).softmax(-1), scales[3], 0, 1)
    expected = probabilities @ elastic(value, scales[2], -1, 1)
    torch.testing.assert_close(context, expected)
    upstream = random(*context.shape, seed=8)
    found = torch.autograd.grad(context, [query, key, value, *(part.size for part in parts)], upstream)
    wanted = torch.autograd.grad(expected, [query, key, value, *scales], upstream)
    numbers = [query.numel()] * 3 + [probabilities.numel()]
    for one, other in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(one, other)
    for one, other, number in zip(found[3:], wanted[3:], numbers, strict=True):
        torch.testing.assert_close(one, other / math.sqrt(number))  # LSQ's factor


def test_bit_never_has_a_negative_probability():
    module = BiTAttention(12)
    _, weights = module(*[h.float() for h in heads(2)], FACTOR)
    assert weights.detach().unique().tolist() == [0.0, pytest.approx(module.probability.scale.item())]


# --- BiPFT


def filled(module):
    generator = torch.Generator().manual_seed(0)
    for part in (module.qm, module.km, module.qp, module.kp, module.vp):
        for parameter in part.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return module


def test_bipft_begins_as_bit_bit_for_bit():
    plain, estimated = with_scales(BiTAttention(12)), with_scales(BiPFTAttention(12))
    tokens = random(BATCH, TOKENS, 12, seed=9)
    one, other = (m(*heads(3), FACTOR, tokens=tokens) for m in (plain, estimated))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_bipft_equals_its_sums_written_out():
    module, (query, key, value) = filled(with_scales(BiPFTAttention(12))), heads(4)
    tokens = random(BATCH, TOKENS, 12, seed=9)
    context, _ = module(query, key, value, FACTOR, tokens=tokens)
    qm, km, qp, kp, vp = (
        (tokens @ part.weight.T + part.bias)[..., 0]
        for part in (module.qm, module.km, module.qp, module.kp, module.vp)
    )
    a_q, a_k, a_v, a_p = (p.size.item() for p in (module.query, module.key, module.value, module.probability))
    expected = torch.zeros_like(context)
    for b in range(BATCH):
        for h in range(HEADS):
            scores = torch.empty(TOKENS, TOKENS, dtype=torch.float64)
            for i in range(TOKENS):
                for j in range(TOKENS):
                    product = a_q * a_k * (signs(query[b, h, i]) * signs(key[b, h, j])).sum()
                    left_out = qm[b, i] * kp[b, j] + qp[b, i] * km[b, j] + qp[b, i] * kp[b, j]
                    scores[i, j] = (product + left_out) * FACTOR
            codes = (scores.softmax(-1) / a_p).round().clamp(0, 1) * a_p
            for i in range(TOKENS):
                for j in range(TOKENS):
                    expected[b, h, i] += codes[i, j] * (a_v * signs(value[b, h, j]) + vp[b, j])
    torch.testing.assert_close(context, expected.detach())


def test_the_estimates_of_bipft_have_rank_two_and_are_the_same_for_every_head():
    module, (query, key, _) = filled(with_scales(BiPFTAttention(12))), heads(5)
    tokens = random(BATCH, TOKENS, 12, seed=9)
    left_out = module.scores(query, key, tokens) - BiTAttention.scores(module, query, key, tokens)
    assert torch.allclose(left_out[:, 0], left_out[:, 1])
    assert torch.linalg.matrix_rank(left_out[0, 0], tol=1e-9) == 2
    qm, km, qp, kp = (part(tokens) for part in (module.qm, module.km, module.qp, module.kp))
    torch.testing.assert_close(left_out[:, 0], (qp + qm) @ (kp + km).mT - qm @ km.mT)


def test_gradients_reach_all_five_maps_of_bipft():
    module, tokens = filled(with_scales(BiPFTAttention(12))), random(BATCH, TOKENS, 12, seed=9)
    context, _ = module(*heads(6), FACTOR, tokens=tokens)
    context.square().sum().backward()
    for part in (module.qm, module.km, module.qp, module.kp, module.vp):
        assert part.weight.grad.abs().sum() > 0


# --- all of them


@pytest.mark.parametrize("method", ["bivit", "bit", "bipft"])
def test_codes_switched_off_leave_the_real_attention(method):
    module, (query, key, value) = attentions[method](12).double(), heads(7)
    module.is_on = False
    added = random(1, 1, TOKENS, TOKENS, seed=7)
    context, _ = module(query, key, value, FACTOR, added, tokens=random(BATCH, TOKENS, 12))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=added)
    torch.testing.assert_close(context, expected)


@pytest.mark.parametrize("method", ["bivit", "bit", "bipft"])
def test_what_a_mask_hides_has_no_part_in_the_context(method):
    module, (query, key, value) = attentions[method](12).double(), heads(8)
    if method != "bivit":
        with_scales(module)
    added = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
    added[:, 3:] = torch.finfo(torch.float64).min
    tokens = random(BATCH, TOKENS, 12)
    context, weights = module(query, key, value, FACTOR, added, tokens=tokens)
    assert not weights[..., 3:].any()
    value = value.detach().clone()
    value[:, :, 3:] *= -1
    assert torch.equal(context, module(query, key, value, FACTOR, added, tokens=tokens)[0])


@pytest.mark.parametrize("method", ["bivit", "bit", "bipft"])
def test_dropout_keeps_the_mean_of_the_context(method):
    module, (query, key, value) = attentions[method](12).double(), heads(9)
    tokens = random(BATCH, TOKENS, 12)
    full = module(query, key, value, FACTOR, tokens=tokens)[0]
    torch.manual_seed(0)
    drawn = torch.stack([module(query, key, value, FACTOR, None, 0.3, tokens)[0] for _ in range(1000)])
    error = (drawn.mean(0) - full).abs().max() / drawn.std(0).max()
    assert error < 5 / math.sqrt(1000)
    assert torch.equal(module.eval()(query, key, value, FACTOR, None, 0.3, tokens)[0], full)
