"""Every strategy against random search, on problems whose every network is known (``tests/tables.py``)."""

import numpy as np
import pytest

import lightning_nas as nas
from lightning_nas.objectives import Maximize
from lightning_nas.space import Choice, SearchSpace
from tests.tables import TABLES


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_a_table_holds_each_network_once_and_answers_what_its_exact_front_is_made_of(make):
    table = make()
    assert len(table.accuracies) == table.space.size
    assert 0 < table.exact < (table.accuracies.max() - table.reference["accuracy"]) * table.reference["cost"]
    rng = np.random.default_rng(0)
    for architecture in (table.space.sample(rng) for _ in range(20)):
        known = np.isclose(table.costs, table(architecture)) & np.isclose(
            table.accuracies, table.evaluate(architecture)["accuracy"]
        )
        assert known.any()


def test_an_inactive_choice_changes_neither_accuracy_nor_cost():
    table = TABLES["encoder"]()
    for mlp in (1, 2, 3):
        shallow = {**table.space.smallest, "layers.5.mlp": mlp}
        assert table(shallow) == table(table.space.smallest)
        assert table.evaluate(shallow) == table.evaluate(table.space.smallest)


@pytest.mark.slow
def test_strategies_beat_random_search_by_their_confidence_interval():
    table = TABLES["NAS-Bench-MACRO"]()
    comparison = nas.compare(
        ["nsga2", "nsga3", "tpe", "evolution", "coarse-to-fine", "gbdt"],
        table.space,
        table.evaluate,
        table.objectives,
        budget=150,
        seeds=6,
        reference=table.reference,
        storage="memory",
        progress=False,
    )
    summary = comparison.summary(confidence=0.95).drop(index="random")
    assert (summary["gain from"] > 0).all(), summary
    assert (summary["evaluations"] < 100).all(), summary  # to what random search has after 150
    assert max(curves.max() for curves in comparison.curves.values()) <= table.exact * (1 + 1e-9)


def test_grid_finds_what_one_option_of_a_choice_decides_in_as_many_evaluations_as_there_are_options():
    # Random search misses one option of 40 in 40 draws with probability (39 / 40)^40 = 0.36.
    space = SearchSpace(
        [Choice("decides", tuple(range(40))), *(Choice(f"idle{i}", (0, 1)) for i in range(6))]
    )
    comparison = nas.compare(
        ["grid"], space, lambda a: {"score": float(a["decides"] == 17)}, [Maximize("score")], budget=40,
        seeds=20, storage="memory", progress=False,
    )  # fmt: skip
    assert (comparison.curves["grid"][:, -1] == 1).all()
    assert comparison.curves["random"][:, -1].mean() < 1
    assert comparison.summary().loc["grid", "gain from"] > 0
