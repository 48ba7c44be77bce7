"""Gradients of binary layers against closed forms, in float64."""

import pytest
import torch

from lightning_nas.binary import Activations, BinaryLinear, Weights
from lightning_nas.estimators import STE, ReSTE


def codes(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def case(**forms):
    """A layer without bias in float64 with weights in every region of the rules, an input, a gradient."""
    layer = BinaryLinear(9, 4, bias=False, dtype=torch.float64, **forms)
    layer.weight.data = torch.randn(4, 9, dtype=torch.float64)
    layer.weight.data[0, :4] = torch.tensor([0.0, 0.05, -1.2, 1.7])
    if "weight_scale" in layer._parameters:
        layer.weight_scale.data = torch.rand(4, dtype=torch.float64) + 0.5
    return layer, torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


def reste_slope(z, power=3.0):
    size = z.abs()
    slope = torch.where(size <= 0.1, 0.1 ** ((1 - power) / power), size ** ((1 - power) / power) / power)
    return torch.where(size <= 1.5, slope, 0.0)


def test_the_weight_of_reste_gets_its_gradient_through_codes_and_scale():
    layer, x, g = case(estimator="reste", weights=Weights(scale="layer", grad_through_scale=True))
    layer(x).backward(g)
    w = layer.weight.detach()
    of_effective = g.T @ x  # of scale * codes
    closed = reste_slope(w) * w.abs().mean() * of_effective + codes(w) / 36 * (of_effective * codes(w)).sum()
    closed[w == 0] -= (codes(w) / 36 * (of_effective * codes(w)).sum())[w == 0]  # |w| has no slope at 0
    torch.testing.assert_close(layer.weight.grad, closed)


@pytest.mark.parametrize("clip", [1.0, None])
def test_the_clipped_rule_masks_the_product_of_gradient_and_input(clip):
    layer, x, g = case(estimator=STE(clip=clip), weights=Weights(scale=None))
    layer(x).backward(g)
    mask = layer.weight.abs() <= clip if clip else 1.0
    torch.testing.assert_close(layer.weight.grad, (g.T @ x) * mask)


def test_a_detached_scale_only_multiplies_the_gradient():
    layer, x, g = case(estimator="ste")
    layer(x).backward(g)
    w = layer.weight.detach()
    torch.testing.assert_close(layer.weight.grad, (g.T @ x) * w.abs().mean(1, keepdim=True) * (w.abs() <= 1))


def test_a_relative_estimator_counts_in_means_and_undoes_the_scale():
    layer, x, g = case(estimator="reste", weights=Weights(is_relative=True))
    layer(x).backward(g)
    w = layer.weight.detach()
    torch.testing.assert_close(layer.weight.grad, (g.T @ x) * reste_slope(w / w.abs().mean(1, keepdim=True)))


def test_a_learned_scale_gets_the_sum_of_gradient_and_product():
    layer, x, g = case(estimator="ste", weights=Weights(scale="learned"))
    layer(x).backward(g)
    torch.testing.assert_close(layer.weight_scale.grad, (g * (x @ codes(layer.weight).T)).sum(0))


def test_ternary_weights_get_the_gradient_unchanged():
    layer, x, g = case(weights="ternary")
    layer(x).backward(g)
    torch.testing.assert_close(layer.weight.grad, g.T @ x)


def test_centred_weights_get_a_gradient_without_its_mean():
    layer, x, g = case(estimator="identity", weights=Weights(scale=None, treatment="centred"))
    layer(x).backward(g)
    whole = g.T @ x
    torch.testing.assert_close(layer.weight.grad, whole - whole.mean(1, keepdim=True))


def test_inputs_and_their_learned_scale_get_the_elastic_gradients():
    layer, x, g = case(estimator="ste", weights=Weights(scale=None), activations=1)
    layer(x)  # its scale starts here
    wider = (x * 1.7).requires_grad_()
    layer(wider).backward(g)
    scale, of_effective = layer.input_scale.detach(), g @ codes(layer.weight.detach())
    assert scale == x.abs().mean()
    torch.testing.assert_close(wider.grad, of_effective * (wider.abs() <= scale))
    torch.testing.assert_close(layer.input_scale.grad, (of_effective * codes(x)).sum() / 54**0.5)


def test_inputs_of_0_and_1_get_the_elastic_gradients():
    layer, x, g = case(weights=Weights(scale=None), activations=1)
    x = x.relu().requires_grad_()
    layer(x).backward(g)
    scale, of_effective = layer.input_scale.detach(), g @ codes(layer.weight.detach())
    ratio = x.detach() / scale
    ones = (ratio > 0.5).double()
    inside = ratio <= 1
    torch.testing.assert_close(x.grad, of_effective * inside)
    of_scale = torch.where(inside, ones - ratio, ones)
    torch.testing.assert_close(layer.input_scale.grad, (of_effective * of_scale).sum() / 54**0.5)


def test_a_threshold_of_the_inputs_gets_minus_their_gradient():
    layer, x, g = case(estimator=ReSTE(), activations=Activations(scale=None, has_threshold=True))
    layer.input_threshold.data = torch.randn(9, dtype=torch.float64)
    x.requires_grad_()
    y = layer(x)
    y.backward(g)
    moved = x.detach() - layer.input_threshold.detach()
    torch.testing.assert_close(y, (codes(moved) @ codes(layer.weight).T) * layer.scale)
    torch.testing.assert_close(x.grad, (g * layer.scale) @ codes(layer.weight) * reste_slope(moved))
    torch.testing.assert_close(layer.input_threshold.grad, -x.grad.sum(0))
