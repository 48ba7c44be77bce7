from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import lightning_nas as nas
from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet import Supernet, default_space, supports


def test_a_marked_layer_is_the_layer_it_was():
    layer = nn.Linear(3, 8)
    before, output = layer.state_dict(), layer(torch.ones(3))
    assert nas.elastic(layer, out=(4, 8)) is layer
    assert type(layer) is nn.Linear
    assert layer.state_dict().keys() == before.keys()
    assert torch.equal(layer(torch.ones(3)), output)


def test_shares_are_of_the_layers_own_outputs_and_round_to_at_least_one():
    model = nn.Sequential(nas.elastic(nn.Linear(3, 10), out=(0.01, 0.26, 7, 1.0)), nn.Linear(10, 3))
    assert default_space(model)["0.out"].values == (1, 3, 7, 10)


def test_the_last_mark_counts():
    layer = nas.elastic(nas.elastic(nn.Linear(3, 8), out=(4, 8)), out=(2, 8))
    assert default_space(nn.Sequential(layer, nn.Linear(8, 3)))["0.out"].values == (2, 8)


def test_a_layer_and_a_container_alone_are_no_networks():
    layer = nas.elastic(nn.Linear(3, 8), out=(4, 8))
    assert not supports(layer)
    assert not supports(nn.ModuleList([layer]))
    assert supports(nn.Sequential(layer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"give out=\.\.\. or depth=\.\.\., one of them"),
        ({"out": (4, 8), "depth": (1, 2)}, r"give out=\.\.\. or depth=\.\.\., one of them"),
        ({"out": (4, 9)}, r"out cannot be 9; give ints from 1 to 8.* or floats in \(0, 1\] for shares"),
        ({"out": (0, 8)}, r"out cannot be 0"),
        ({"out": (0.5, 1.5)}, r"out cannot be 1\.5"),
        ({"out": (True, 8)}, r"out cannot be True"),
        ({"out": (2, 4)}, r"the options \(2, 4\) must hold all 8"),
        ({"out": nas.Choice("width", (0.5, 1.0))}, r"out cannot be 0\.5; give ints from 1 to 8, [^,]*$"),
        ({"out": nas.Depth("width", (4, 8))}, r"'width' is a Depth"),
        ({"out": (4, 8), "through": ("norm",)}, r"into= names what reads the outputs"),
    ],
)
def test_options_that_do_not_fit_are_refused_where_they_are_given(options, message):
    layer = nn.Linear(3, 8)
    with pytest.raises(ValueError, match=message):
        nas.elastic(layer, **options)
    assert not supports(nn.Sequential(layer))


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Embedding(3, 8), {"out": (4, 8)}, r"Embedding\. Supported: Linear, Conv1d, Conv2d, Conv3d"),
        (nn.Linear(3, 8), {"depth": (4, 8)}, r"Linear\. Supported: Sequential, ModuleList"),
        (timm.layers.StdConv2d(3, 8, 3), {"out": (4, 8)}, r"timm.*StdConv2d"),
        (nn.Conv2d(8, 8, 3, groups=8), {"out": (4, 8)}, r"in 8 groups .* Mark the layer in front of it"),
        (nn.Sequential(*[nn.Linear(3, 3)] * 2), {"depth": (1, 2)}, r"a block is several times"),
    ],
)
def test_layers_that_cannot_be_marked_are_refused(layer, options, message):
    with pytest.raises(UnsupportedError, match=message):
        nas.elastic(layer, **options)


def test_a_layer_that_is_elastic_already_is_refused():
    model = nn.Sequential(nas.elastic(nn.Linear(3, 8), out=(4, 8)), nn.Linear(8, 3))
    Supernet(model)
    with pytest.raises(UnsupportedError, match=r"ElasticLinear"):
        nas.elastic(model[0], out=(2, 8))
