from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from lightning_nas.costs import Bytes, Parameters, resolve
from tests.costs.networks import NETWORKS, residual


def stored(network) -> int:
    return sum(tensor.nbytes for tensor in chain(network.parameters(), network.buffers()))


@pytest.mark.filterwarnings("ignore:.*statistics")
@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_are_those_that_the_extracted_network_holds(name):
    supernet, _ = NETWORKS[name]()
    rng = np.random.default_rng(0)
    chosen = [
        supernet.space.largest,
        supernet.space.smallest,
        *(supernet.space.sample(rng) for _ in range(2)),
    ]
    networks = [supernet.extract(architecture) for architecture in chosen]
    assert list(Bytes(supernet).many(chosen)) == [stored(network) for network in networks]
    assert list(Bytes(supernet, "float16").many(chosen)) == [stored(n.half()) for n in networks]


def test_fewer_bits_are_rounded_up_to_whole_bytes():
    supernet = residual(width=3, hidden=(1, 2), bias=False)  # 2 * 3 weights in the smallest
    smallest = supernet.space.smallest
    assert Parameters(supernet)(smallest) == 6
    assert [Bytes(supernet, bits)(smallest) for bits in (32, 8, 4, 2, 1)] == [24, 6, 3, 2, 1]
    assert Bytes(supernet, "int4")(smallest) == 3
    assert resolve("bytes", supernet, None)(smallest) == 24


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("bfloat", r"unknown dtype 'bfloat'.*Did you mean 'bfloat16'"),
        (0, r"must be .* a number of bits from 1, got 0"),
        (1.5, r"got 1.5"),
    ],
)
def test_what_is_no_data_type_is_refused(dtype, message):
    with pytest.raises(ValueError, match=message):
        Bytes(residual(), dtype)
