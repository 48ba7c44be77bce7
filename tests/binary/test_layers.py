import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from lightning_nas.binary import (
    Activations,
    BinaryConv1d,
    BinaryConv2d,
    BinaryEmbedding,
    BinaryLinear,
    Weights,
    set_bits,
)
from lightning_nas.estimators import BiPer


def codes(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def with_zeros(layer):
    """Random weights and bias, with exact zeros among them."""
    for parameter in (layer.weight, layer.bias):
        parameter.data = torch.randn_like(parameter)
    layer.weight.data.view(-1)[::7] = 0.0
    layer.weight.data.view(-1)[1::7] = -0.0
    return layer.eval()


LAYERS = {
    "linear": (lambda **k: BinaryLinear(37, 5, **k), (3, 4, 37), F.linear, {}),
    "conv": (lambda **k: BinaryConv2d(6, 4, 3, **k), (2, 6, 8, 9), F.conv2d, {}),
    "strided": (
        lambda **k: BinaryConv2d(6, 4, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), **k),
        (2, 6, 8, 9), F.conv2d, {"stride": 2, "padding": (1, 0), "dilation": (1, 2)},
    ),
    "grouped": (lambda **k: BinaryConv2d(6, 4, 3, padding=1, groups=2, **k), (2, 6, 8, 9), F.conv2d,
                {"padding": 1, "groups": 2}),
    "conv1d": (lambda **k: BinaryConv1d(6, 4, 5, padding="same", **k), (2, 6, 11), F.conv1d,
               {"padding": "same"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("activations", [32, Activations(scale=None), Activations(scale="learned")])
def test_a_layer_is_the_product_of_explicit_codes_and_then_the_scales(name, bits, activations):
    make, shape, product, geometry = LAYERS[name]
    layer = with_zeros(make(weights=bits, activations=activations))
    x = torch.randn(shape)
    x.view(-1)[::5] = 0.0
    if bits == 1:
        scale, weight = layer.weight.abs().flatten(1).mean(1), codes(layer.weight)
    else:
        scale = layer.weight.abs().flatten(1).mean(1) * 4 / 3
        size = scale.view(-1, *(1,) * (layer.weight.ndim - 1)) / 2
        weight = (layer.weight > size).float() - (layer.weight < -size).float()
    y = layer(x)
    assert torch.equal(layer.binary_weight, weight)
    inputs = x if activations == 32 else codes(x)
    expected = product(inputs.double(), weight.double(), None, **geometry)
    along = (-1,) if name == "linear" else (-1, *(1,) * (x.ndim - 2))
    of_inputs = x.abs().mean() if getattr(activations, "scale", None) == "learned" else 1.0
    real = expected * scale.view(along).double() * of_inputs + layer.bias.view(along)
    torch.testing.assert_close(y.double(), real, rtol=1e-5, atol=1e-5)
    if activations != 32:  # to the last bit in the order of the contract
        ordered = expected.float() * layer.scale.view(along)
        ordered = ordered * layer.input_scale if of_inputs != 1.0 else ordered
        assert torch.equal(y, ordered + layer.bias.view(along))


def test_inputs_that_are_never_negative_get_codes_of_0_and_1():
    layer = with_zeros(BinaryConv2d(4, 3, 3, padding=1, activations=1))
    assert layer.input_is_nonnegative is None
    x = torch.randn(2, 4, 6, 6).relu()
    y = layer(x)
    assert layer.input_is_nonnegative
    ones = (x > layer.input_scale / 2).float()
    assert 0 < ones.mean() < 1
    expected = F.conv2d(ones.double(), codes(layer.weight).double(), padding=1).float()
    expected = expected * layer.scale.view(-1, 1, 1) * layer.input_scale + layer.bias.view(-1, 1, 1)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("bits", [1, 2])
def test_an_embedding_looks_up_codes_times_the_scale_of_their_row(bits):
    layer = BinaryEmbedding(11, 6, padding_idx=0, weights=bits)
    ids = torch.tensor([[3, 0, 3], [10, 1, 2]])
    assert torch.equal(layer(ids), (layer.binary_weight * layer.scale[:, None])[ids])
    assert torch.equal(layer(ids)[0, 1], torch.zeros(6))
    assert layer(ids[0, 0]).shape == (6,)
    learned = BinaryEmbedding(11, 6, weights=Weights(scale="learned"))
    learned.weight_scale.data.uniform_(1, 2)
    assert torch.equal(learned(ids), (codes(learned.weight) * learned.weight_scale[:, None])[ids])


def test_the_xnor_scale_is_the_mean_of_what_each_output_sees():
    layer = with_zeros(BinaryConv2d(4, 3, 3, padding=1, activations=Activations(scale="xnor")))
    x = torch.randn(2, 4, 6, 6)
    seen = F.avg_pool2d(F.pad(x.abs().mean(1, keepdim=True), (1, 1, 1, 1)), 3, 1)
    product = F.conv2d(codes(x), codes(layer.weight), padding=1) * layer.scale.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), product * seen + layer.bias.view(-1, 1, 1))


def test_padding_repeats_codes_where_the_layer_repeats_its_inputs():
    layer = with_zeros(
        BinaryConv2d(2, 3, 3, padding=1, padding_mode="circular", activations=Activations(scale=None))
    )
    x = torch.randn(1, 2, 5, 5)
    product = F.conv2d(F.pad(codes(x), (1, 1, 1, 1), mode="circular"), codes(layer.weight))
    assert torch.equal(layer(x), product * layer.scale.view(-1, 1, 1) + layer.bias.view(-1, 1, 1))


def test_products_of_codes_are_whole_numbers_in_half_precision():
    layer = BinaryLinear(4099, 3, activations=Activations(scale=None))
    layer.weight.data = torch.randn(3, 4099) + 0.5
    x = torch.randn(50, 4099) + 1
    exact = (codes(x).double() @ codes(layer.weight).double().T).float()
    assert exact.abs().max() > 512  # where bfloat16 has not all integers
    expected = (exact * layer.scale + layer.bias).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)  # and of the type that the plain layer gives
    assert torch.equal(layer(x).bfloat16(), expected)
    layer, x = layer.bfloat16(), x.bfloat16()
    exact = (codes(x).double() @ codes(layer.weight).double().T).float()
    assert torch.equal(layer(x), (exact * layer.scale + layer.bias).bfloat16())


def test_a_real_layer_in_between_is_the_plain_one():
    layer = with_zeros(BinaryLinear(8, 3, activations=1, weights=Weights(treatment="centred")))
    x = torch.randn(4, 8)
    layer(x)
    set_bits(layer, weights=32, activations=32)
    assert torch.equal(layer(x), F.linear(x, layer.weight) + layer.bias)
    set_bits(layer, activations=1)
    torch.testing.assert_close(layer(x), F.linear(codes(x) * layer.input_scale, layer.weight, layer.bias))
    with pytest.raises(ValueError, match="1 or 32 bits here, got 2"):
        set_bits(layer, weights=2)


def test_the_first_stage_of_biper_multiplies_with_the_sine():
    layer = BinaryLinear(
        8, 3, bias=False, estimator=BiPer(frequency=5.0, stage=1), weights=Weights(scale=None)
    )
    x = torch.randn(4, 8)
    torch.testing.assert_close(layer(x), x @ torch.sin(5 * layer.weight).T)


@pytest.mark.parametrize("activations", [32, 1])
def test_a_copy_and_a_pickle_compute_the_same(activations):
    layer = BinaryLinear(8, 3, activations=activations, weights=Weights(scale="learned"))
    x = torch.randn(4, 8)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)


@pytest.mark.parametrize("activations", [32, 1])
def test_a_compiled_layer_is_one_graph_and_computes_the_same(activations):
    layer = BinaryLinear(8, 3, activations=activations)
    x = torch.randn(4, 8)
    layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (layer, compiled):
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(compiled(x), layer(x))
    torch.testing.assert_close(*gradients)


def test_a_copy_made_before_the_first_batch_takes_what_its_buffers_tell():
    layer = BinaryLinear(8, 3, activations=1)
    averaged = copy.deepcopy(layer)
    layer(torch.rand(4, 8))
    for mine, theirs in zip(averaged.state_dict().values(), layer.state_dict().values(), strict=True):
        mine.copy_(theirs)
    x = torch.randn(4, 8)  # of both signs: seen as a first batch, it would change codes and scale
    assert torch.equal(averaged(x), layer(x))


def test_a_first_batch_that_is_not_finite_is_refused_and_the_next_one_counts():
    layer = BinaryLinear(8, 3, activations=1)
    x = torch.rand(4, 8)
    with pytest.raises(ValueError, match="BinaryLinear.in_features=8.*not finite"):
        layer(x.index_fill(1, torch.tensor([2]), torch.nan))
    layer(x)
    assert layer.input_is_nonnegative


def test_an_embedding_has_no_activations():
    with pytest.raises(ValueError, match="no activations to code"):
        BinaryEmbedding(4, 2, activations=1)
