import copy
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

import lightning_nas as nas
from lightning_nas.estimators import (
    DSQ,
    EDE,
    STE,
    BiPer,
    BiReal,
    ReSTE,
    estimating_error,
    estimator_named,
    estimators,
    gradient_stability,
    sign,
    sine_penalty,
    straight_through,
)

POINTS = (0.0, 0.05, 0.5, 1.0, 1.2, 1.6)
SLOPES = {  # of the formulas in the papers, at POINTS
    STE(clip=None): (1, 1, 1, 1, 1, 1),
    STE(): (1, 1, 1, 1, 0, 0),
    BiReal(): (2, 1.9, 1, 0, 0, 0),
    EDE(t=0.001, k=1000): (1, 1, 1, 0.999999, 0.999999, 0.999997),
    EDE(t=0.1): (1, 0.999975, 0.997504, 0.990066, 0.985737, 0.974831),
    EDE(t=1): (1, 0.997504, 0.786448, 0.419974, 0.305020, 0.150527),
    EDE(t=10): (10, 7.864477, 0.001816, 8.2e-8, 0, 0),
    DSQ(alpha=0.5): (1.098612, 1.097784, 1.019735, 0.823959, 0, 0),
    DSQ(alpha=0.2): (1.373265, 1.369130, 1.029949, 0.494376, 0, 0),
    DSQ(alpha=0.05): (1.928190, 1.912106, 0.917626, 0.187999, 0, 0),
    ReSTE(power=1): (1, 1, 1, 1, 1, 0),
    ReSTE(power=2): (3.162278, 3.162278, 0.707107, 0.5, 0.456435, 0),
    ReSTE(power=3): (4.641589, 4.641589, 0.529134, 0.333333, 0.295183, 0),
    BiPer(frequency=1): (1, 0.998750, 0.877583, 0.540302, 0.362358, -0.029200),
    BiPer(frequency=20): (20, 10.806046, -16.781431, 8.161641, 8.483580, 16.684467),
}
INTEGRALS = [  # over [-end, end], in closed form
    (STE(clip=None), 3.0, 6.0),
    (STE(), 3.0, 2.0),
    (BiReal(), 3.0, 2.0),
    (EDE(t=0.1, k=10), 3.0, 20 * math.tanh(0.3)),
    (EDE(t=1), 3.0, 2 * math.tanh(3)),
    (EDE(t=10), 3.0, 2.0),
    (DSQ(alpha=0.5), 3.0, 2.0),
    (DSQ(alpha=0.2), 3.0, 2.0),
    (DSQ(alpha=0.05), 3.0, 2.0),
    (BiPer(frequency=1), 1.0, 2 * math.sin(1)),
    (BiPer(frequency=20), 1.0, 2 * math.sin(20)),
]
EVERY = [STE(), STE(clip=None), BiReal(), EDE(), DSQ(), ReSTE(), BiPer(), BiPer(frequency=1.0)]
by_name = pytest.mark.parametrize("estimator", EVERY, ids=repr)


def gradient(estimator, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(estimator(x).sum(), x)[0]


@pytest.mark.parametrize(("estimator", "expected"), SLOPES.items(), ids=repr)
@pytest.mark.parametrize("side", [1, -1])
def test_the_gradient_is_the_named_rule_at_points_of_both_sides(estimator, expected, side):
    found = gradient(estimator, side * torch.tensor(POINTS, dtype=torch.float64))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("estimator", "end", "expected"), INTEGRALS, ids=repr)
def test_the_gradient_has_the_integral_of_the_paper(estimator, end, expected):
    x = torch.linspace(-end, end, 400_001, dtype=torch.float64)
    assert torch.trapezoid(gradient(estimator, x), x).item() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_reste_has_the_integral_of_its_root(power):
    x = torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    # The line within the chord and the root beyond it meet, so cutting costs nothing: 2 clip^(1 / power).
    found = torch.trapezoid(gradient(ReSTE(power=power), x), x).item()
    assert found == pytest.approx(2 * 1.5 ** (1 / power), abs=1e-3)


@by_name
def test_the_forward_is_exactly_minus_one_and_one(estimator):
    x = torch.randn(2_000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        codes = estimator(x.to(dtype))
        assert codes.dtype == dtype
        assert set(codes.tolist()) == {-1.0, 1.0}
        assert codes.shape == x.shape
    if not isinstance(estimator, BiPer):
        assert torch.equal(estimator(x), torch.from_numpy(np.where(x.numpy() >= 0, 1, -1)).float())


@by_name
def test_zero_of_either_sign_is_plus_one(estimator):
    assert estimator(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]


def test_what_is_no_number_counts_as_not_negative():
    assert sign(torch.tensor([float("nan"), float("inf"), -float("inf")])).tolist() == [1.0, 1.0, -1.0]


@by_name
def test_the_slope_is_the_derivative_of_the_surrogate(estimator):
    x = torch.linspace(-2, 2, 97, dtype=torch.float64)[1:-1] + 0.00731  # clear of edges
    step = 1e-6
    difference = (estimator.surrogate(x + step) - estimator.surrogate(x - step)) / (2 * step)
    torch.testing.assert_close(gradient(estimator, x), difference, rtol=1e-5, atol=1e-5)


@by_name
def test_the_rule_equals_the_detach_trick_on_the_surrogate(estimator):
    x = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    upstream = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    surrogate = estimator.surrogate(x)
    trick = (sign(x) - surrogate).detach() + surrogate
    expected = torch.autograd.grad(trick, x, upstream)[0]
    torch.testing.assert_close(torch.autograd.grad(estimator(x), x, upstream)[0], expected)


def test_reste_jumps_at_its_chord_and_ends_at_its_clip():
    edge = torch.tensor([0.1, 0.1 + 1e-9, 1.5, 1.5 + 1e-6], dtype=torch.float64)
    at, beyond, last, outside = gradient(ReSTE(power=3), edge).tolist()
    assert (at, beyond) == (pytest.approx(4.641589, abs=1e-5), pytest.approx(1.547196, abs=1e-5))
    assert last > 0
    assert outside == 0


def test_reste_within_its_chord_is_the_line_between_the_ends_of_the_root():
    x = torch.tensor([0.1], dtype=torch.float64)
    for power in (1, 2, 3, 7.5):
        rule = ReSTE(power=power)
        rise = 2 * 0.1 ** (1 / power)
        assert gradient(rule, torch.zeros_like(x)).item() * 0.2 == pytest.approx(rise, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@by_name
def test_gradients_are_finite_and_close_to_exact_ones_in_low_precision(estimator, dtype):
    x = torch.cat([torch.tensor([0.0, 1e-30, 1e-6]), torch.linspace(-2, 2, 41)]).to(dtype)
    found = gradient(estimator, x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), gradient(estimator, x.double()), rtol=2e-2, atol=2e-2)


def test_schedules_pass_their_points():
    reste, ede = ReSTE(power=3), EDE()
    for progress, power in ((0, 1), (0.25, 1.152241), (0.5, 1.585786), (0.75, 2.234633), (1, 3)):
        reste.schedule(progress)
        assert reste.current.item() == pytest.approx(power, abs=1e-5)
    for progress, t in ((0, 0.1), (0.25, 0.316228), (0.5, 1), (0.75, 3.162278), (1, 10)):
        ede.schedule(progress)
        assert ede.t.item() == pytest.approx(t, abs=1e-5)
        assert ede.k.item() == pytest.approx(max(1 / t, 1), abs=1e-4)


@by_name
def test_every_estimator_can_be_scheduled_within_the_run_only(estimator):
    rule = copy.deepcopy(estimator)
    rule.schedule(0)
    rule.schedule(1)
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got 1.5"):
        rule.schedule(1.5)


def test_raising_the_power_lowers_the_error_and_raises_the_instability():
    weight = torch.randn(4_000, generator=torch.Generator().manual_seed(0)) * 0.5
    errors, variances = [], []
    for power in (1.0, 1.5, 2.0, 3.0):
        errors.append(estimating_error(weight, ReSTE(power=power)).item())
        variances.append(gradient_stability(gradient(ReSTE(power=power), weight)).item())
    assert all(a > b for a, b in pairwise(errors))
    assert all(a < b for a, b in pairwise(variances))


def test_indicators_equal_their_closed_forms():
    rule = ReSTE(power=3)
    assert estimating_error(torch.tensor([1.0, -1.0, 1.0]), rule).item() == pytest.approx(0, abs=1e-6)
    constant = torch.full((50,), 0.3)
    expected = math.sqrt(50) * abs(1 - 0.3 ** (1 / 3))
    assert estimating_error(constant, rule).item() == pytest.approx(expected, rel=1e-5)
    wave = torch.full((50,), -0.3)  # sin(-6) is above 0: the code is +1
    expected = math.sqrt(50) * (1 - math.sin(-6))
    assert estimating_error(wave, BiPer(frequency=20)).item() == pytest.approx(expected, rel=1e-5)
    g = torch.tensor([1.0, -2.0, 3.0, -4.0])
    assert gradient_stability(g).item() == pytest.approx(np.var([1, 2, 3, 4], ddof=1))


def test_biper_is_periodic_and_odd_by_half_a_period():
    rule, w = BiPer(), torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    assert torch.equal(rule(w), rule(w + 2 * math.pi / 20))
    assert torch.equal(rule(w), -rule(w + math.pi / 20))


def test_biper_of_the_first_stage_is_the_sine_with_its_own_derivative():
    rule, w = BiPer(stage=1), torch.linspace(-1, 1, 33, dtype=torch.float64)
    torch.testing.assert_close(rule(w), torch.sin(20 * w))
    torch.testing.assert_close(gradient(rule, w), 20 * torch.cos(20 * w))
    assert not rule.is_binary
    assert BiPer().is_binary
    small = torch.tensor([1e-6], dtype=torch.float64)
    assert rule(small).item() == pytest.approx(20e-6)


def test_the_penalty_of_biper_and_its_gradient_are_as_written():
    w = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    penalty = sine_penalty(w)
    assert penalty.item() == pytest.approx(np.mean(0.5 - 0.5 * np.cos(40 * w.detach().numpy())))
    found = torch.autograd.grad(penalty, w)[0]
    torch.testing.assert_close(found, 20 * torch.sin(40 * w.detach()) / 40)


def test_normalising_activations_changes_the_gradient_and_not_the_codes():
    rule, x = BiReal(normalize=True), 7 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    trained = rule(x)
    assert torch.equal(trained, rule.eval()(x))
    y = x / torch.sqrt(x.flatten(1).var(1).view(3, 1, 1) + 1e-5)
    expected = torch.autograd.grad((2 * y.clamp(-1, 1) - y.clamp(-1, 1) * y.clamp(-1, 1).abs()).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(trained.sum(), x)[0], expected)


def test_examples_of_one_entry_are_normalised_without_a_nan():
    x = torch.tensor([[-1.0], [2.0]])
    assert BiReal(normalize=True)(x).tolist() == [[-1.0], [1.0]]
    assert torch.isfinite(gradient(BiReal(normalize=True), x)).all()


# --- as modules


@by_name
def test_second_derivatives_are_those_of_the_surrogate(estimator):
    x = torch.tensor([-1.25, -0.3, 0.05, 0.3, 0.8, 1.7], dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(1, 2, 6, dtype=torch.float64)

    def second(function):
        loss = (function(x) * upstream).sum() + (x**3).sum()
        return torch.autograd.grad(torch.autograd.grad(loss, x, create_graph=True)[0].sum(), x)[0]

    torch.testing.assert_close(second(estimator), second(estimator.surrogate), rtol=1e-5, atol=1e-5)


@by_name
def test_nothing_but_the_input_is_kept_for_the_backward_pass(estimator):
    x, kept = torch.randn(1_000, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        estimator(x)
    assert [t.data_ptr() for t in kept if t.ndim] == [x.data_ptr()]


@pytest.mark.parametrize("estimator", [EDE(), ReSTE()], ids=repr)
def test_a_schedule_that_moves_between_forward_and_backward_is_refused(estimator):
    x = torch.randn(4, requires_grad=True)
    codes = estimator(x)
    estimator.schedule(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        codes.sum().backward()


@by_name
def test_copies_pickles_and_state_dicts_hold_what_they_must(estimator):
    for same in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        assert repr(same) == repr(estimator)
    assert estimator.state_dict() == {}


@pytest.mark.slow
def test_one_compiled_graph_serves_the_whole_schedule():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()  # of what other tests compiled
    for rule in (STE(), BiReal(), EDE(), DSQ(), ReSTE(), BiPer()):
        counter = CompileCounter()
        compiled = torch.compile(rule, fullgraph=True, backend=counter)
        x = torch.randn(64)
        for progress in (0, 0.5, 1):
            rule.schedule(progress)
            inner = x.clone().requires_grad_()
            compiled(inner).sum().backward()
            torch.testing.assert_close(inner.grad, gradient(rule, x))
        assert counter.frame_count == 1


def test_autocast_keeps_codes_and_gradients():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = torch.nn.functional.linear(BiReal()(x), ReSTE()(weight))
    expected = sign(x).double() @ sign(weight).double().T
    assert torch.equal(product.double(), expected)  # up to 8 in size: exact in bfloat16
    product.sum().backward()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: STE(clip=0), "STE: clip must be a number above 0, got 0"),
        (lambda: EDE(t=-1), "EDE: t must be a number above 0, got -1"),
        (lambda: DSQ(alpha=1), r"DSQ: alpha must be in \(0, 1\), got 1"),
        (lambda: ReSTE(power=0.5), "ReSTE: power must be at least 1, got 0.5"),
        (lambda: ReSTE(clip=0.1, chord=0.2), "chord must be below clip, got 0.2 and 0.1"),
        (lambda: BiPer(frequency=math.inf), "frequency must be a number above 0, got inf"),
        (lambda: BiPer(stage=3), "stage must be 1"),
        (lambda: estimator_named("rest"), "Unknown estimator 'rest'. Did you mean 'reste'"),
    ],
)
def test_settings_out_of_range_are_refused_with_their_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names_and_instances_mean_the_same():
    assert set(estimators) == {"ste", "identity", "bireal", "ede", "dsq", "reste", "biper"}
    assert isinstance(estimator_named("reste"), nas.estimators.ReSTE)
    rule = ReSTE(power=2)
    assert estimator_named(rule) is rule
    with pytest.raises(TypeError, match="registered name"):
        estimator_named(3)


def test_straight_through_gives_any_codes_any_slope():
    x = torch.randn(4, requires_grad=True)
    codes, slope = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 0.5, 2.0])
    out = straight_through(x, codes, slope)
    assert torch.equal(out, codes)
    out.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [0.0, 2.0, 1.5, 8.0]
