from dataclasses import dataclass

import numpy as np
import optuna
import pytest

from lightning_nas.objectives import Maximize, Minimize
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.strategies import NSGA2, Random, strategies
from lightning_nas.study import search

SPACE = SearchSpace(
    [Choice("a", (1, 2, 3)), Choice("b", ("x", "y"), when={"a": (2, 3)}), Choice("c", (0.5, 1.0))]
)
OBJECTIVES = [Maximize("gain"), Minimize("loss")]


def measure(architecture, share=1.0):
    return {
        "gain": architecture["a"] * architecture["c"],
        "loss": architecture["a"] + (architecture["b"] == "y"),
    }


def keys(strategy, **settings):
    settings = {"budget": 8, "storage": "memory", "progress": False, **settings}
    result = search(SPACE, measure, OBJECTIVES, strategy=strategy, **settings)
    return [c.architecture.key for c in result.candidates]


def test_names_stand_for_classes():
    names = {"random", "grid", "nsga2", "nsga3", "tpe", "evolution", "coarse-to-fine"}
    assert set(strategies) >= names
    assert (strategies["random"](), strategies["nsga2"]()) == (Random(), NSGA2())
    assert keys("nsga2") == keys(NSGA2())


@pytest.mark.parametrize("name", list(strategies))
def test_every_strategy_measures_a_small_space_completely_and_resumes_exactly(name, tmp_path):
    everything = keys(name, budget=20)
    assert sorted(everything) == sorted(a.key for a in SPACE.enumerate())
    keys(name, budget=3, storage=tmp_path / "s.log")
    assert keys(name, storage=tmp_path / "s.log") == keys(name)


@pytest.mark.parametrize("name", list(strategies))
def test_the_sign_of_an_objective_is_a_matter_of_taste(name):
    space = SearchSpace([Choice(f"c{i}", (0, 1, 2, 3)) for i in range(5)])

    def measure(architecture, share=1.0):
        a, b, c, d, e = architecture.values()
        nudge = np.random.default_rng((a, b, c, d, e)).random(2)  # no two values are equal
        gain, loss = a + 2 * b - abs(c - d) + nudge[0], a + b + c + (d - e) ** 2 + nudge[1]
        return {"gain": gain, "price": -gain, "loss": loss, "profit": -loss}

    def found(*objectives):
        result = search(
            space, measure, objectives, strategy=name, budget=60, storage="memory", progress=False
        )
        return [c.architecture.key for c in result.candidates]

    one_way = found(Maximize("gain"), Minimize("loss"))
    assert found(Minimize("price"), Minimize("loss")) == one_way
    assert found(Minimize("price"), Maximize("profit")) == one_way


def test_any_optuna_sampler_becomes_a_strategy_in_a_few_lines(tmp_path):
    @dataclass(frozen=True)
    class TPE:
        def sampler(self, problem, budget, seed, proposal):
            return optuna.samplers.TPESampler(seed=seed + proposal, n_startup_trials=3)

    assert len(set(keys(TPE()))) == 8
    keys(TPE(), budget=5, storage=tmp_path / "s.log")
    assert keys(TPE(), storage=tmp_path / "s.log") == keys(TPE())
