from dataclasses import dataclass

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


def measure(architecture):
    return {
        "gain": architecture["a"] * architecture["c"],
        "loss": architecture["a"] + (architecture["b"] == "y"),
    }


def keys(strategy, **settings):
    settings = {"budget": 8, "storage": "memory", "progress": False, **settings}
    result = search(SPACE, measure, OBJECTIVES, strategy=strategy, **settings)
    return [c.architecture.key for c in result.candidates]


def test_names_stand_for_classes():
    assert set(strategies) >= {"random", "nsga2"}
    assert (strategies["random"](), strategies["nsga2"]()) == (Random(), NSGA2())
    assert keys("nsga2") == keys(NSGA2())


@pytest.mark.parametrize("name", list(strategies))
def test_every_strategy_measures_a_small_space_completely_and_resumes_exactly(name, tmp_path):
    everything = keys(name, budget=20)
    assert sorted(everything) == sorted(a.key for a in SPACE.enumerate())
    keys(name, budget=3, storage=tmp_path / "s.log")
    assert keys(name, storage=tmp_path / "s.log") == keys(name)


def test_any_optuna_sampler_becomes_a_strategy_in_a_few_lines(tmp_path):
    @dataclass(frozen=True)
    class TPE:
        def sampler(self, problem, budget, seed, proposal):
            return optuna.samplers.TPESampler(seed=seed + proposal, n_startup_trials=3)

    assert len(set(keys(TPE()))) == 8
    keys(TPE(), budget=5, storage=tmp_path / "s.log")
    assert keys(TPE(), storage=tmp_path / "s.log") == keys(TPE())
