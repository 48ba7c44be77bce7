import numpy as np
import pytest

from lightning_nas.objectives import Maximize, Minimize
from lightning_nas.space import Choice, Depth, SearchSpace
from lightning_nas.strategies import CoarseToFine
from lightning_nas.strategies.coarse_to_fine import skeletons
from lightning_nas.study import search
from tests import macro_table

LAYERS = 6
SPACE = SearchSpace(
    [
        Choice("depth", (1, 2, 3)),
        *(Choice(f"layers.{i}.heads", (1, 2, 3, 4)) for i in range(LAYERS)),
        *(Choice(f"layers.{i}.mlp", (8, 16, 24, 32, 40)) for i in range(LAYERS)),
    ]
)


def gain(architecture):
    """Best is one width for all layers, but for one layer that wants less and one that wants more."""
    ideal = {"heads": [3, 3, 2, 3, 3, 4], "mlp": [24, 24, 24, 24, 24, 32]}
    misses = [abs(architecture["depth"] - 3)]
    misses += [abs(architecture[f"layers.{i}.heads"] - ideal["heads"][i]) for i in range(LAYERS)]
    misses += [abs(architecture[f"layers.{i}.mlp"] - ideal["mlp"][i]) / 8 for i in range(LAYERS)]
    return {"gain": -float(sum(misses))}


def found(strategy, seed, budget=150):
    return search(
        SPACE, gain, [Maximize("gain")], strategy=strategy, budget=budget, seed=seed, storage="memory",
        progress=False,
    )  # fmt: skip


def is_alike(architecture):
    return all(
        len({architecture[f"layers.{i}.{kind}"] for i in range(LAYERS)}) == 1 for kind in ("heads", "mlp")
    )


def test_the_coarse_phase_measures_every_network_that_is_alike_in_all_layers():
    candidates = found(CoarseToFine(coarse=80), seed=0, budget=100).candidates
    # 3 depths, 4 numbers of heads, 5 widths of the MLP: 60 networks
    assert [is_alike(c.architecture) for c in candidates[:60]] == [True] * 60
    assert len({c.architecture.key for c in candidates[:60]}) == 60
    assert candidates[0].architecture == SPACE.largest
    assert candidates[1].architecture == SPACE.smallest
    assert not is_alike(candidates[60].architecture)


@pytest.mark.parametrize("seed", range(3))
def test_the_fine_phase_finds_the_layers_that_differ(seed):
    best = max(found("coarse-to-fine", seed).candidates, key=lambda c: c.values["gain"])
    assert best.values["gain"] == 0  # the known optimum, one of 190 million


def test_random_search_does_not_find_them():
    assert max(c.values["gain"] for c in found("random", 0).candidates) < -4


def test_the_fine_phase_moves_members_of_the_front_to_values_beside_theirs():
    candidates = found(CoarseToFine(coarse=12, mutation=0.0), seed=0, budget=60).candidates
    for i in range(12, 60):
        best = max(c.values["gain"] for c in candidates[:i])
        fronts = [c.architecture for c in candidates[:i] if c.values["gain"] == best]
        steps = [
            [
                abs(choice.values.index(front[choice.name]) - choice.values.index(own[choice.name]))
                for choice in SPACE
            ]
            for front in fronts
            for own in [candidates[i].architecture]
        ]
        assert min(sum(step) for step in steps) == 1


def test_levels_of_shorter_choices_are_the_nearest_shares_and_inactive_choices_are_no_further_networks():
    space = SearchSpace(
        [
            Depth("depth", (1, 2), keeps=((0,), (0, 1))),
            Choice("layers.0.mlp", (1, 2, 3, 4, 5)),
            Choice("layers.1.mlp", (10, 20, 30), when={"depth": (2,)}),
        ]
    )
    rows = {tuple(row.values()) for row in skeletons(space, 99, np.random.default_rng(0))}
    deep = {(2, 1, 10), (2, 2, 10), (2, 3, 20), (2, 4, 30), (2, 5, 30)}  # halves round to even: 0.5 to 0
    assert rows == deep | {(1, width, 30) for width in (1, 2, 3, 4, 5)}


@pytest.mark.slow
def test_coarse_to_fine_beats_random_search_on_nas_bench_macro():
    def volumes(strategy):
        objectives = [Maximize("accuracy"), Minimize(macro_table.MegaFlops())]
        results = [
            search(
                macro_table.SPACE, macro_table.accuracy, objectives, strategy=strategy, budget=200, seed=seed,
                storage="memory", progress=False,
            )
            for seed in range(4)
        ]  # fmt: skip
        return np.array([result.hypervolume({"accuracy": 80, "mflops": 120}) for result in results])

    refined, drawn = volumes("coarse-to-fine"), volumes("random")
    assert refined.mean() - drawn.mean() > 2.6 * np.hypot(refined.std(), drawn.std()) / np.sqrt(4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coarse": 0}, "coarse must be at least 1, got 0"),
        ({"mutation": -1}, "mutation is a probability.*got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CoarseToFine(**settings)
