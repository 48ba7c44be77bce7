from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_nas.evaluation import difference_of_means
from lightning_nas.objectives import Maximize, Minimize
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.strategies import NSGA3
from lightning_nas.strategies.nsga3 import survivors
from lightning_nas.study import search


def test_of_a_crowded_front_one_in_each_direction_survives():
    even = np.linspace(0, 1, 11)  # eleven directions for eleven members
    crowd = np.linspace(0.41, 0.49, 40)
    x = np.random.default_rng(0).permutation(np.concatenate([even, crowd]))
    kept = survivors(np.stack([x, 1 - x], axis=1), np.zeros(51), 11, np.random.default_rng(0))
    np.testing.assert_allclose(np.sort(x[kept]), even)


@given(seed=st.integers(0, 99), count=st.integers(2, 15))
def test_whole_fronts_survive_first_and_what_breaks_constraints_last(seed, count):
    rng = np.random.default_rng(seed)
    losses, violations = rng.integers(0, 5, (16, 3)).astype(float), np.maximum(rng.normal(-0.5, 1, 16), 0)

    def beats(i, j):
        if violations[i] or violations[j]:
            return violations[i] < violations[j]
        return (losses[i] <= losses[j]).all() and (losses[i] < losses[j]).any()

    @cache
    def front(i):
        return 1 + max((front(j) for j in range(16) if beats(j, i)), default=-1)

    kept = set(survivors(losses, violations, count, rng).tolist())
    assert len(kept) == count
    assert max(map(front, kept)) <= min(map(front, set(range(16)) - kept))


SPACE = SearchSpace([Choice(f"c{i}", (0, 1, 2, 3)) for i in range(9)])


def measure(architecture):
    """Three groups of choices buy three gains; what a group agrees upon is worth more than its sum."""
    groups = np.array(list(architecture.values())).reshape(3, 3)
    waste = abs(groups - groups.mean(axis=1, keepdims=True)).sum()
    first, second, third = groups.sum(axis=1) / 9
    return {
        "speed": first - waste / 9,
        "size": 1 - second + waste / 9,
        "error": 2 - first - second - third + waste,
    }


def test_nsga3_beats_random_search_on_three_objectives():
    def volume(strategy, seed):
        result = search(
            SPACE, measure, [Maximize("speed"), Minimize("size"), Minimize("error")], strategy=strategy,
            budget=200, seed=seed, storage="memory", progress=False,
        )  # fmt: skip
        return result.hypervolume({"speed": 0, "size": 1, "error": 2})

    evolved, drawn = ([volume(strategy, seed) for seed in range(4)] for strategy in ("nsga3", "random"))
    assert difference_of_means(evolved, drawn).low > 0


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="NSGA3: population must be at least 2, got 1"):
        NSGA3(population=1)
    with pytest.raises(ValueError, match=r"NSGA3: mutation is a probability.*got 2"):
        NSGA3(mutation=2)
