import math
import sys
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest

import lightning_nas as nas
from lightning_nas.errors import StudyMismatchError
from lightning_nas.evaluation import expected_best_of
from lightning_nas.objectives import Maximize, Minimize
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.strategies import NSGA2, Evolution
from tests import macro_table

SPACE = SearchSpace([Choice(f"layer{i}", (0, 1, 2, 3)) for i in range(4)])  # 256 architectures
OBJECTIVES = [Maximize("gain"), Minimize("price")]
QUIET = {"storage": "memory", "progress": False}


def measure(architecture):
    a, b, c, d = architecture.values()
    return {"gain": float(a + 2 * b - abs(c - d)), "price": float(a + b + c)}


class Counting:
    def __init__(self, stop_after=math.inf):
        self.asked, self.stop_after = [], stop_after

    def __call__(self, architecture):
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(architecture.key)
        return measure(architecture)


def test_curves_are_the_hypervolumes_of_single_searches_cut_short():
    reference = {"gain": -3.0, "price": 9.0}
    comparison = nas.compare(
        ["nsga2"], SPACE, measure, OBJECTIVES, budget=40, seeds=2, reference=reference, **QUIET
    )
    for strategy in ("nsga2", "random"):
        for seed in (0, 1):
            whole = nas.search(SPACE, measure, OBJECTIVES, strategy=strategy, budget=40, seed=seed, **QUIET)
            assert comparison.results[strategy][seed].candidates == whole.candidates
            for count in (1, 7, 40):
                part = nas.SearchResult(SPACE, whole.objectives, whole.candidates[:count])
                assert comparison.curves[strategy][seed, count - 1] == pytest.approx(
                    part.hypervolume(reference)
                )


def test_an_architecture_is_evaluated_once_whoever_asks_for_it():
    counting = Counting()
    comparison = nas.compare(["nsga2", "evolution"], SPACE, counting, OBJECTIVES, budget=50, seeds=3, **QUIET)
    found = {c.architecture.key for runs in comparison.results.values() for r in runs for c in r.candidates}
    assert sorted(counting.asked) == sorted(found)
    assert comparison.evaluated == len(found)


def test_a_comparison_that_was_stopped_continues_and_a_larger_one_pays_for_what_is_new(tmp_path):
    settings = {"budget": 30, "progress": False, "reference": {"gain": -3.0, "price": 9.0}}
    stored = {**settings, "storage": tmp_path / "c.log"}
    with pytest.raises(KeyboardInterrupt) as stopped:
        nas.compare(["nsga2"], SPACE, Counting(stop_after=50), OBJECTIVES, seeds=2, **stored)
    if sys.version_info >= (3, 11):
        kept, where = stopped.value.__notes__
        assert "50 finished evaluations are kept in" in kept
        assert "search 'random, seed 0': evaluate was stopped" in where
    rest, whole = Counting(), Counting()
    continued = nas.compare(["nsga2"], SPACE, rest, OBJECTIVES, seeds=2, **stored)
    straight = nas.compare(["nsga2"], SPACE, whole, OBJECTIVES, seeds=2, storage="memory", **settings)
    pd.testing.assert_frame_equal(continued.to_dataframe(), straight.to_dataframe())
    assert len(rest.asked) == len(whole.asked) - 50

    more = Counting()
    larger = nas.compare(["nsga2", "tpe"], SPACE, more, OBJECTIVES, seeds=3, **stored)
    np.testing.assert_array_equal(larger.curves["nsga2"][:2], straight.curves["nsga2"])
    assert set(more.asked).isdisjoint(whole.asked)


def test_one_objective_is_compared_by_its_best_value_and_random_search_has_its_exact_expectation():
    comparison = nas.compare(
        ["evolution"], macro_table.SPACE, macro_table.accuracy, [Maximize("accuracy")], budget=50, seeds=25,
        **QUIET,
    )  # fmt: skip
    assert (np.diff(comparison.curves["random"]) >= 0).all()
    final = comparison.curves["random"][:, -1]
    expected = expected_best_of(50, [accuracy for accuracy, _ in macro_table.table().values()])
    assert abs(final.mean() - expected) < 3 * final.std(ddof=1) / math.sqrt(25)


def test_a_minimised_objective_falls_and_its_gain_is_positive_where_it_is_better():
    def error(architecture):
        return {"error": float(sum(architecture.values()))}

    strategies = {"evolved": Evolution(population=10)}
    comparison = nas.compare(strategies, SPACE, error, [Minimize("error")], budget=40, seeds=10, **QUIET)
    curves, summary = comparison.curves, comparison.summary()
    assert (np.diff(curves["evolved"]) <= 0).all()
    difference = curves["random"][:, -1].mean() - curves["evolved"][:, -1].mean()
    assert summary.loc["evolved", "gain"] == pytest.approx(difference)
    assert summary.loc["evolved", "gain from"] > 0


def test_the_summary_is_what_the_curves_say():
    curves = {
        "quick": np.array([[1.0, 5.0, 5.0], [3.0, 3.0, 7.0], [0.0, 6.0, 6.0]]),
        "slow": np.array([[1.0, 1.0, 1.0], [0.0, 3.0, 4.0], [0.0, 0.0, 2.0]]),
        "random": np.array([[1.0, 2.0, 2.0], [2.0, 3.0, 3.0], [0.0, 0.0, 4.0]]),
    }
    reference = {"gain": 0.0, "price": 0.0}
    comparison = nas.Comparison(tuple(OBJECTIVES), (0, 1, 2), reference, curves, {}, evaluated=9)
    summary = comparison.summary()
    assert summary.loc["quick", ["lower quartile", "median", "upper quartile"]].tolist() == [5.5, 6, 6.5]
    # Random ends at 3 in the median: the quick runs are there after 2, 1, 2 evaluations, a slow one after 2.
    assert summary["evaluations"].tolist() == [2, math.inf, 3]
    assert summary.loc["quick", "gain"] == 3
    assert summary.loc["random", ["gain", "gain from", "gain to"]].isna().all()
    long = comparison.to_dataframe()
    assert long.columns.tolist() == ["strategy", "seed", "evaluations", "hypervolume"]
    assert long.query("strategy == 'slow' and seed == 1")["hypervolume"].tolist() == [0, 3, 4]


def test_failures_and_broken_constraints_count_as_evaluations_and_for_nothing_else():
    def sometimes(architecture):
        values = measure(architecture)
        return {**values, "gain": math.nan} if architecture["layer0"] == 3 else values

    settings = {"budget": 80, "seeds": 2, "constraints": {"price": ("<=", 4)}, **QUIET}
    comparison = nas.compare(["grid"], SPACE, sometimes, OBJECTIVES, **settings)
    for strategy, results in comparison.results.items():
        for result, curve in zip(results, comparison.curves[strategy], strict=True):
            assert len(result.candidates) + len(result.failed) == len(curve) == 80
            assert len(result.failed) > 10
            assert curve[-1] == pytest.approx(result.hypervolume(comparison.reference))
    assert comparison.reference["price"] <= 4


def test_a_space_that_is_used_up_leaves_the_curve_where_it_is():
    tiny = SPACE.restrict({f"layer{i}": (0, 1) for i in range(4)})
    comparison = nas.compare(["grid"], tiny, measure, OBJECTIVES, budget=30, seeds=1, **QUIET)
    assert comparison.evaluated == 16
    ends = [curves[0, 15:] for curves in comparison.curves.values()]
    np.testing.assert_allclose(ends, ends[0][0])


def test_the_folder_holds_table_summary_and_plot(tmp_path):
    backend = matplotlib.get_backend()
    strategies = [NSGA2(population=10), "random"]
    comparison = nas.compare(
        strategies, SPACE, measure, OBJECTIVES, budget=20, seeds=(3, 7), folder=tmp_path / "c", **QUIET
    )
    assert matplotlib.get_backend() == backend
    table = pd.read_csv(tmp_path / "c" / "comparison.csv")
    pd.testing.assert_frame_equal(table, comparison.to_dataframe())
    assert sorted(table["seed"].unique()) == [3, 7]
    text = (tmp_path / "c" / "comparison.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {9}
    assert "counted from gain " in text
    assert (tmp_path / "c" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    axes = comparison.plot().axes[0]
    np.testing.assert_allclose(axes.lines[1].get_ydata(), np.median(comparison.curves["random"], axis=0))


def test_one_seed_is_compared_without_an_interval():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = nas.compare(["tpe"], SPACE, measure, OBJECTIVES, budget=12, seeds=1, **QUIET)
        assert comparison.summary().loc["tpe", "gain to"] == math.inf
        assert "inf" in comparison.to_markdown()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"strategies": []}, ValueError, "at least one strategy"),
        ({"strategies": ["nsga2", "nsga2"]}, ValueError, "given more than once: nsga2"),
        ({"strategies": ["nsga22"]}, ValueError, "Unknown strategy 'nsga22'.*Did you mean 'nsga2'"),
        ({"strategies": [NSGA2]}, TypeError, "instance with a method sampler"),
        ({"strategies": {"random": NSGA2()}}, ValueError, r"'random' is the label.*NSGA2\("),
        ({"seeds": (0, -1)}, ValueError, r"from 0 up, got \(0, -1\)"),
        ({"seeds": 0}, ValueError, "seeds must be at least one.*got 0"),
        ({"seeds": (1, 1)}, ValueError, r"each once and from 0 up, got \(1, 1\)"),
        ({"budget": 0}, ValueError, "budget is a number of evaluations.*got 0"),
        ({"reference": {"gain": 0}}, ValueError, "must name 'gain', 'price', got 'gain'"),
        ({"constraints": {"price": ("<", 0)}}, ValueError, "no run found a candidate that keeps"),
    ],
)
def test_bad_input_is_refused(changes, error, message):
    arguments = {
        "strategies": ["grid"],
        "evaluate": measure,
        "objectives": OBJECTIVES,
        "budget": 5,
        "seeds": 1,
    }
    arguments |= QUIET
    with pytest.raises(error, match=message):
        nas.compare(space=SPACE, **{**arguments, **changes})


def test_a_stored_comparison_of_another_space_is_refused(tmp_path):
    settings = {"budget": 5, "seeds": 1, "storage": tmp_path / "c.log", "progress": False}
    nas.compare(["grid"], SPACE, measure, OBJECTIVES, **settings)
    with pytest.raises(StudyMismatchError, match="'comparison'.*layer0"):
        nas.compare(["grid"], SPACE.restrict({"layer0": (0, 1)}), measure, OBJECTIVES, **settings)
