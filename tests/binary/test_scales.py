import math

import pytest
import torch

from lightning_nas.binary import (
    ReCU,
    RPReLU,
    RSign,
    Weights,
    binary_matmul,
    centred,
    least_squares_scale,
    mean_magnitude,
    power_of_two,
    standardised,
    window_magnitude,
)


def test_no_scale_of_a_channel_has_a_smaller_error_than_the_mean_magnitude():
    weight = torch.randn(3, 2, 5, dtype=torch.float64)
    signs = torch.where(weight >= 0, 1.0, -1.0).double()

    def error(scale):
        return (weight - scale.view(3, 1, 1) * signs).square().sum((1, 2))

    best = error(mean_magnitude(weight))
    grid = torch.linspace(0, 3, 3001, dtype=torch.float64)
    searched = torch.stack([error(scale.expand(3)) for scale in grid]).amin(0)
    assert (best <= searched).all()
    closed = weight.square().sum((1, 2)) - weight.abs().sum((1, 2)).square() / 10
    torch.testing.assert_close(best, closed)


def test_the_scale_of_a_slice_is_that_of_its_copy_to_the_last_bit():
    slice_of = torch.randn(40, 130)[:17, :77]
    for per in ("channel", "layer"):
        assert torch.equal(mean_magnitude(slice_of, per), mean_magnitude(slice_of.clone(), per))


@pytest.mark.parametrize(
    ("scale", "power"), [(0.798, 1.0), (1.0, 1.0), (0.7, 0.5), (0.3, 0.25), (5.0, 4.0), (6.0, 8.0)]
)
def test_power_of_two_rounds_in_the_logarithm(scale, power):
    assert power_of_two(torch.tensor(scale)).item() == power


@pytest.mark.parametrize("is_unsigned", [False, True])
def test_no_input_scale_on_a_grid_has_a_smaller_error(is_unsigned):
    x = torch.randn(4000, dtype=torch.float64)
    x = x.relu() if is_unsigned else x + 0.3

    def error(scale):
        codes = (x > scale / 2).double() if is_unsigned else torch.where(x >= 0, 1.0, -1.0).double()
        return (x - scale * codes).square().mean()

    found = error(least_squares_scale(x, is_unsigned))
    best = min(error(scale) for scale in torch.linspace(0.05, 4, 400, dtype=torch.float64))
    assert found <= best * 1.001


def test_an_input_of_zeros_has_a_scale_above_zero():
    assert least_squares_scale(torch.zeros(5), True) > 0
    assert least_squares_scale(torch.zeros(5), False) > 0


def test_window_magnitude_is_the_mean_over_what_an_output_sees():
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    found = window_magnitude(x, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    padded = torch.nn.functional.pad(x.abs(), (0, 0, 1, 1))
    for row in range(found.shape[2]):
        for column in range(found.shape[3]):
            seen = padded[:, :, 2 * row : 2 * row + 3, column : column + 3 : 2]
            torch.testing.assert_close(found[:, 0, row, column], seen.mean((1, 2, 3)))


def test_integer_products_are_exact_under_autocast():
    a, b = (torch.where(torch.randn(s) >= 0, 1.0, -1.0) for s in ((2, 3, 999), (2, 999, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        product = binary_matmul(a.bfloat16(), b)
    assert torch.equal(product.double(), a.double() @ b.double())


# --- treatments


def test_standardised_channels_have_mean_zero_and_deviation_one():
    rows = standardised(torch.rand(4, 3, 5, dtype=torch.float64) * 7 + 3).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(rows.std(1), torch.ones(4, dtype=torch.float64), rtol=1e-4, atol=0)


def test_the_gradient_of_standardising_is_its_closed_form():
    weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(3, 8, dtype=torch.float64)
    standardised(weight, eps=0).backward(gradient)
    with torch.no_grad():
        sigma = weight.std(1, keepdim=True)
        done = (weight - weight.mean(1, keepdim=True)) / sigma
        along = (gradient * done).sum(1, keepdim=True) / 7
        closed = (gradient - gradient.mean(1, keepdim=True) - done * along) / sigma
    torch.testing.assert_close(weight.grad, closed)


def test_a_constant_channel_is_standardised_to_finite_values_and_gradients():
    weight = torch.full((2, 4), 0.3, requires_grad=True)
    standardised(weight).sum().backward()
    assert torch.isfinite(standardised(weight)).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("treatment", [standardised, centred])
def test_a_treated_weight_does_not_see_what_is_added_to_a_channel(treatment):
    weight = torch.randn(3, 9, dtype=torch.float64)
    torch.testing.assert_close(treatment(weight + 5), treatment(weight))


def test_recu_clamps_at_the_quantile_of_a_laplace_law():
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    treated = ReCU(tau=0.9)(laplace[None])
    is_clamped = treated.abs() == treated.abs().max()
    assert is_clamped.double().mean().item() == pytest.approx(2 - 2 * 0.9, abs=0.005)
    assert treated.max().item() == pytest.approx(-2 * math.log(0.2), rel=0.02)


def test_a_gradient_reaches_what_recu_clamps_only_through_mean_and_deviation():
    weight = torch.randn(1, 50, dtype=torch.float64, requires_grad=True)
    treated = ReCU(tau=0.8)(weight)
    is_clamped = treated.abs() == treated.abs().max()
    assert 0 < is_clamped.sum() < 50
    treated[is_clamped].sum().backward()  # their sum is a constant
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight))


# --- RSign and RPReLU


@pytest.mark.parametrize(("dim", "shape"), [(1, (2, 3, 4, 4)), (-1, (2, 5, 3))])
def test_the_gradient_of_a_threshold_is_minus_the_sum_of_the_inputs(dim, shape):
    layer = RSign(3, dim).double()
    layer.threshold.data = torch.tensor([-0.5, 0.0, 0.7], dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(shape, dtype=torch.float64)
    codes = layer(x)
    codes.backward(gradient)
    moved = x.detach() - layer.threshold.detach().view(
        [3 if d == dim % len(shape) else 1 for d in range(len(shape))]
    )
    assert torch.equal(codes, torch.where(moved >= 0, 1.0, -1.0).double())
    torch.testing.assert_close(x.grad, gradient * (2 - 2 * moved.abs()).clamp(min=0))
    others = [d for d in range(len(shape)) if d != dim % len(shape)]
    torch.testing.assert_close(layer.threshold.grad, -x.grad.sum(others))


def test_rprelu_has_the_gradients_of_its_formula():
    layer = RPReLU(2).double()
    layer.shift.data, layer.offset.data = torch.tensor([[0.5, -0.3], [1.0, 2.0]], dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    gradient = torch.randn_like(x)
    y = layer(x)
    y.backward(gradient)
    with torch.no_grad():
        shift, slope, offset = (p.view(2, 1) for p in (layer.shift, layer.slope, layer.offset))
        above = x > shift
        torch.testing.assert_close(y, torch.where(above, x - shift + offset, slope * (x - shift) + offset))
        of_shift = torch.where(above, -1.0, -slope)
        torch.testing.assert_close(layer.shift.grad, (gradient * of_shift).sum((0, 2)))
        torch.testing.assert_close(layer.slope.grad, (gradient * (x - shift) * ~above).sum((0, 2)))
        torch.testing.assert_close(layer.offset.grad, gradient.sum((0, 2)))


# --- bad values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits must be 1, 2"),
        ({"scale": "chanel"}, "Did you mean 'channel'"),
        ({"treatment": "centered"}, "Did you mean 'centred'"),
        ({"scale": "learned", "grad_through_scale": True}, "'channel' and 'layer'"),
    ],
)
def test_a_wrong_form_of_weights_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Weights(**arguments)
