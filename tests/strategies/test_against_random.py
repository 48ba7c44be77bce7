import pytest

import lightning_nas as nas
from lightning_nas.objectives import Maximize, Minimize
from tests import macro_table


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["nsga3", "tpe", "evolution"])
def test_the_strategy_beats_random_search_on_nas_bench_macro(strategy):
    comparison = nas.compare(
        [strategy],
        macro_table.SPACE,
        macro_table.accuracy,
        [Maximize("accuracy"), Minimize(macro_table.MegaFlops())],
        budget=150,
        seeds=6,
        reference={"accuracy": 80, "mflops": 120},
        storage="memory",
        progress=False,
    )
    row = comparison.summary(confidence=0.99).loc[strategy]
    assert row["gain from"] > 0
    assert row["evaluations"] < 100  # to what random search has after 150
    assert row["upper quartile"] <= 1207.5482  # that of the complete table
