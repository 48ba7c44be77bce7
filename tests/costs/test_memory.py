from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightning_nas.costs import PeakMemory, resolve
from lightning_nas.supernet import Supernet
from tests.costs.networks import NETWORKS, residual

X = torch.zeros(1, 5, 4)  # 80 bytes
WEIGHTS = {8: 4 * (32 + 8 + 32 + 4), 2: 4 * (8 + 2 + 8 + 4)}


def hidden(supernet, units):
    return supernet.space.architecture({supernet.space.names[0]: units})


def test_peak_memory_is_that_of_a_residual_block_by_hand():
    supernet = residual()
    peak = PeakMemory(supernet, X)
    # of 8 units the activation is the peak: the input (80), what goes into it and what comes out (160 each)
    assert peak(hidden(supernet, 8)) == WEIGHTS[8] + 80 + 160 + 160
    # of 2 units the sum is: the input, the branch and their sum (80 each)
    assert peak(hidden(supernet, 2)) == WEIGHTS[2] + 80 + 80 + 80


def test_an_activation_in_place_takes_nothing():
    supernet = residual(act=nn.ReLU(inplace=True))
    assert PeakMemory(supernet, X)(hidden(supernet, 8)) == WEIGHTS[8] + 80 + 160 + 80  # the second layer


def test_a_batch_takes_its_activations_as_often_and_the_weights_once():
    supernet = residual()
    four = resolve("peak_memory", supernet, X.repeat(4, 1, 1))
    assert four(hidden(supernet, 8)) == WEIGHTS[8] + 4 * (80 + 160 + 160)
    assert (four.name, four.unit) == ("peak_memory", "B")


def test_a_network_that_looks_at_values_is_run():
    class SkipsEmptyImages(VisionTransformer):
        def forward(self, x):
            return super().forward(x[x.flatten(1).any(1)])

    settings = {"img_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 12, "depth": 3, "num_heads": 3}
    plain, skipping = (Supernet(make(**settings).eval()) for make in (VisionTransformer, SkipsEmptyImages))
    images = torch.ones(2, 3, 8, 8)
    images[1] = 0
    one = PeakMemory(plain, images[:1])(plain.space.largest)
    # beside what one image takes there are both images, twice as many bytes, until the end
    assert PeakMemory(skipping, images)(skipping.space.largest) == one + 2 * images[0].nbytes


@pytest.mark.parametrize("name", NETWORKS)
def test_the_smallest_network_takes_less_than_the_largest(name):
    supernet, inputs = NETWORKS[name]()
    peak = PeakMemory(supernet, inputs)
    assert peak(supernet.space.smallest) < peak(supernet.space.largest)
