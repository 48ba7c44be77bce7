from __future__ import annotations

import pytest
import torch

from lightning_nas.costs import HOROWITZ_45NM, Energy, EnergyTable, MACs, resolve
from tests.costs.networks import NETWORKS, residual

PICOJOULE = 1e-9  # in millijoules


def test_a_multiply_accumulate_of_single_precision_takes_4_6_picojoules():
    supernet = residual(width=1, hidden=(1, 2), bias=False)
    smallest, one = supernet.space.smallest, torch.zeros(1, 1)
    macs = MACs(supernet, one)(smallest)
    assert macs == 2
    arithmetic = EnergyTable(HOROWITZ_45NM.pj_per_mac)
    assert Energy(supernet, one, arithmetic)(smallest) == pytest.approx(2 * 4.6 * PICOJOULE, rel=1e-12)
    # bytes: 3 numbers a product, 2 for the ReLU, 3 for the sum
    expected = 2 * 4.6 + (2 * 3 + 2 + 3) * 4 * 160
    assert Energy(supernet, one)(smallest) == pytest.approx(expected * PICOJOULE, rel=1e-12)
    halved = 2 * 1.5 + (2 * 3 + 2 + 3) * 2 * 160
    assert Energy(supernet, one, dtype="float16")(smallest) == pytest.approx(halved * PICOJOULE, rel=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_arithmetic_counted_is_all_there_is(name):
    supernet, inputs = NETWORKS[name]()
    energy = Energy(supernet, inputs, EnergyTable({"float32": 1.0}))
    macs = MACs(supernet, inputs)
    for architecture in (supernet.space.largest, supernet.space.smallest):
        assert energy(architecture) == pytest.approx(macs(architecture) * PICOJOULE, rel=1e-12)
    named = resolve("energy", supernet, inputs)
    assert named(supernet.space.smallest) < named(supernet.space.largest)


def test_indices_are_moved_in_their_own_type():
    supernet, inputs = NETWORKS["bert"]()
    moving = EnergyTable({"float32": 0.0, "int8": 0.0}, pj_per_byte=1.0)
    largest = supernet.space.largest
    single, quarter = (Energy(supernet, inputs, moving, dtype)(largest) for dtype in ("float32", "int8"))
    assert single / 4 < quarter < single


def test_a_data_type_that_the_table_lacks_is_refused():
    with pytest.raises(ValueError, match=r"Horowitz, 45 nm has no dtype 'float8'. .*Known: 'float16'"):
        Energy(residual(), torch.zeros(1, 5, 4), dtype="float8")
