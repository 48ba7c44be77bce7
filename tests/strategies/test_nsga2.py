import itertools

import numpy as np
import pytest

from lightning_nas.objectives import Maximize, Minimize
from lightning_nas.problem import Problem
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.strategies import NSGA2
from lightning_nas.study import search
from tests import macro_table

SPACE = SearchSpace([Choice(f"c{i}", (0, 1, 2, 3)) for i in range(6)])


def error(c):
    """Two choices buy accuracy at a price; the other four must agree with each other, at no price."""
    return (
        12.0
        - 3 * c[0]
        - 2 * c[1]
        + (c[2] - 1) ** 2
        + 2 * abs(c[3] - c[4])
        + (c[4] - 2) ** 2
        + abs(c[5] - c[2])
    )


class Price:
    name, unit = "price", "units"

    def __call__(self, architecture):
        return float(2 * architecture["c0"] + architecture["c1"])


def brute_force_front():
    points = {(error(c), float(2 * c[0] + c[1])) for c in itertools.product(range(4), repeat=6)}
    return {p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)}


def front_found(strategy, seed):
    result = search(
        SPACE,
        lambda architecture: {"error": error(list(architecture.values()))},
        [Minimize("error"), Minimize(Price())],
        strategy=strategy,
        budget=400,  # of 4,096
        seed=seed,
        storage="memory",
        progress=False,
    )
    return {(c.values["error"], c.values["price"]) for c in result.front}


@pytest.mark.parametrize("seed", range(3))
def test_nsga2_finds_the_known_front_of_a_small_space(seed):
    known = brute_force_front()
    assert front_found("nsga2", seed) == known
    assert front_found("random", seed) != known  # so the front is not found by chance


def volumes(strategy, seeds):
    objectives = [Maximize("accuracy"), Minimize(macro_table.MegaFlops())]
    results = [
        search(
            macro_table.SPACE,
            macro_table.accuracy,
            objectives,
            strategy=strategy,
            budget=400,
            seed=seed,
            storage="memory",
            progress=False,
        )
        for seed in range(seeds)
    ]
    return np.array([result.hypervolume({"accuracy": 80, "mflops": 120}) for result in results])


@pytest.mark.slow
def test_nsga2_beats_random_search_on_nas_bench_macro():
    evolved, drawn = volumes("nsga2", 5), volumes("random", 5)
    # Random search scatters by 14 over seeds: the difference of two means of five has a standard error of 9.
    assert evolved.mean() > drawn.mean() + 18
    assert evolved.min() > drawn.mean()
    assert evolved.max() <= 1207.5482  # that of the complete table


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 1}, "population must be at least 2, got 1"),
        ({"crossover": 1.5}, r"crossover is a probability.*got 1\.5"),
        ({"swapping": -0.1}, r"swapping is a probability.*got -0\.1"),
        ({"mutation": 2}, "mutation is a probability.*got 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NSGA2(**settings)


@pytest.mark.parametrize(("budget", "population"), [(8, 10), (100, 10), (400, 20), (5000, 50)])
def test_population_is_a_twentieth_of_the_budget_within_10_and_50(budget, population):
    problem = Problem.checked(SPACE, [Maximize("accuracy")], None)
    assert NSGA2().sampler(problem, budget, 0, 0).population_size == population
    assert NSGA2(population=7).sampler(problem, budget, 0, 0).population_size == 7
