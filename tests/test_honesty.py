"""What a result says about itself, on problems where the truth is planted."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from optuna.storages import InMemoryStorage
from scipy import stats

import lightning_nas as nas
from lightning_nas.honesty import noise_of
from lightning_nas.strategies import LINAS, NSGA2, NSGA3, TPE, Evolution

SPACE = nas.SearchSpace([nas.Choice(f"{i}.width", (1, 2, 3, 4, 5)) for i in range(6)])


class Size:
    name, unit = "size", "units"

    def __call__(self, architecture):
        return float(sum(architecture.values()))


SIZE = Size()
OBJECTIVES = [nas.Maximize("accuracy"), nas.Minimize(SIZE)]


def true(architecture):
    return sum((i + 1) * width**0.5 for i, width in enumerate(architecture.values()))


class Measured:
    """The truth with Gaussian noise, and how often each network was asked for."""

    def __init__(self, sigma=0.0, signal=1.0, seed=0):
        self.sigma, self.signal, self.rng = sigma, signal, np.random.default_rng(seed)
        self.asked = []

    def __call__(self, architecture):
        self.asked.append(architecture.key)
        return {"accuracy": self.signal * true(architecture) + self.sigma * self.rng.normal()}


def searched(evaluate=None, objectives=OBJECTIVES, **given):
    settings = {"strategy": "random", "budget": 40, "storage": "memory", "remeasure": 1, "progress": False}
    settings |= given
    return nas.search(SPACE, evaluate or Measured(), objectives, **settings)


# --- random start


@pytest.mark.parametrize(
    ("strategy", "count"),
    [
        ("random", 40),
        (LINAS(population=8, predictor="ridge", evaluations=200), 8),
        (nas.strategies.GBDTNAS(population=9, drawn=100), 9),
        (NSGA2(population=7), 7),
        (NSGA3(population=7), 7),
        (Evolution(population=11), 11),
        (TPE(startup=6), 6),
        ("grid", 0),
        ("coarse-to-fine", 0),
    ],
    ids=str,
)
def test_the_random_start_is_what_the_strategy_drew_before_it_learnt(strategy, count):
    result = searched(strategy=strategy, remeasure=0)
    assert result.random_start == result.candidates[:count]
    initial = searched(strategy=strategy, remeasure=0, initial=[SPACE.smallest, SPACE.largest])
    assert [c.origin for c in initial.candidates[:2]] == ["initial", "initial"]
    assert len(initial.random_start) == (max(0, count - 2) if strategy != "coarse-to-fine" else 0)


def test_a_resumed_search_knows_its_start_its_predictions_and_its_repeats(tmp_path):
    settings = {
        "strategy": LINAS(population=8, predictor="ridge", evaluations=200),
        "storage": tmp_path / "s",
    }

    def known(result):
        return [(c.key, c.origin, c.predicted, c.repeats) for c in map(Known, result.candidates)]

    searched(budget=13, remeasure=0, **settings)
    whole = searched(Measured(), **{**settings, "storage": "memory"})
    assert known(searched(Measured(), **settings)) == known(whole)
    asked_again = Measured()
    assert known(searched(asked_again, **settings)) == known(whole)
    assert not asked_again.asked


class Known:
    def __init__(self, candidate):
        self.key = candidate.architecture.key
        self.origin, self.predicted, self.repeats = candidate.origin, candidate.predicted, candidate.repeats


# --- random search beside it


def test_the_baseline_is_random_search_with_the_same_budget_and_constraints_in_the_same_storage(tmp_path):
    settings = {"strategy": "nsga2", "constraints": {SIZE: ("<=", 20)}, "storage": tmp_path / "both.log"}
    evaluate = Measured()
    result = searched(evaluate, baseline=True, remeasure=0, **settings)
    assert len(evaluate.asked) == 80
    assert len(result.baseline.candidates) == len(result.baseline.random_start) == 40
    assert all(c.values["size"] <= 20 for c in result.baseline.candidates)
    assert result.baseline.candidates != result.candidates
    assert sorted(p.name for p in tmp_path.iterdir()) == ["both.log"]

    again = Measured()
    resumed = searched(again, baseline=True, remeasure=0, **settings)
    assert not again.asked
    assert resumed.baseline.candidates == result.baseline.candidates


def test_a_search_killed_in_its_baseline_goes_on_there(tmp_path):
    def fails(architecture):
        if len(evaluate.asked) == 55:
            raise KeyboardInterrupt
        return evaluate(architecture)

    evaluate = Measured()
    settings = {"baseline": True, "remeasure": 0, "storage": tmp_path / "s.log"}
    with pytest.raises(KeyboardInterrupt):
        searched(fails, **settings)
    rest = Measured()
    assert len(searched(rest, **settings).baseline.candidates) == 40
    assert len(rest.asked) == 25


def test_the_table_counts_all_hypervolumes_from_the_worst_of_both_searches():
    result = searched(strategy=NSGA2(population=10), baseline=True, remeasure=0)
    everything = [*result.candidates, *result.baseline.candidates]
    worst = {
        "accuracy": min(c.values["accuracy"] for c in everything),
        "size": max(c.values["size"] for c in everything),
    }
    start = replace(result, candidates=result.candidates[:10])
    lines = {line[:16].strip(): line[16:].split() for line in result.summary().splitlines()}
    for name, part in (
        ("this search", result),
        ("its random start", start),
        ("random search", result.baseline),
    ):
        volume, count = lines[name]
        assert float(volume) == pytest.approx(part.hypervolume(worst), rel=1e-4)
        assert int(count) == len(part.candidates)


# --- predictions


@pytest.mark.parametrize(
    "strategy",
    [LINAS(population=8, predictor="ridge", evaluations=200), nas.strategies.GBDTNAS(population=8)],
)
def test_predictor_quality_is_that_of_the_predictions_made_before_measurement(strategy):
    result = searched(strategy=strategy, remeasure=0)
    pairs = np.array(
        [(c.predicted["accuracy"], c.values["accuracy"]) for c in result.candidates[8:] if c.predicted]
    )
    assert not any(c.predicted for c in result.candidates[:8])
    (row,) = result.predictor_quality().itertuples()
    assert row.Index == "accuracy"  # the size is counted
    assert row.n == len(pairs) > 20
    assert row.kendall == pytest.approx(stats.kendalltau(*pairs.T).statistic)
    assert row.spearman == pytest.approx(stats.spearmanr(*pairs.T).statistic)
    assert row.mae == pytest.approx(abs(pairs[:, 0] - pairs[:, 1]).mean())
    assert row.kendall > 0.3


def test_a_value_of_pure_noise_is_not_predicted():
    result = searched(
        Measured(sigma=1, signal=0), strategy=LINAS(population=10, predictor="gbdt"), budget=120, remeasure=0
    )
    assert abs(result.predictor_quality().loc["accuracy", "kendall"]) < 0.25  # in-sample it is near 1


def test_predictions_of_something_minimised_have_its_sign():
    def error(architecture):
        return {"error": 100 - true(architecture)}

    strategy = LINAS(population=8, predictor="ridge", evaluations=200)
    result = searched(error, [nas.Minimize("error"), nas.Minimize(SIZE)], strategy=strategy)
    assert result.predictor_quality().loc["error", "mae"] < 10


# --- the front measured again


def test_the_noise_of_hand_made_pairs_is_the_root_of_half_their_mean_square():
    noise = noise_of([1.0, 2.0, 3.0], [[1.3], [2.0], [3.4]])
    assert noise.deviation == pytest.approx(((0.3**2 + 0.4**2) / 6) ** 0.5)
    assert noise.bias == pytest.approx(0.7 / 3)
    assert noise.bias_error == pytest.approx(np.std([0.3, 0.0, 0.4], ddof=1) / 3**0.5)
    with pytest.raises(ValueError, match="at least one more"):
        noise_of([1.0, 2.0], [[1.0], []])


def test_the_noise_of_several_repetitions_is_their_pooled_deviation_and_leaves_the_first_out():
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 2.0, (5, 4))
    expected = (sum(np.var(row, ddof=1) for row in rows) / 5) ** 0.5
    assert noise_of([-100.0] * 5, rows.tolist()).deviation == pytest.approx(expected)


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_the_noise_reported_is_that_of_the_evaluation(sigma):
    # On a front of some 20 the truth differs by more than the noise, so that winning is no luck. The
    # deviation of n differences has a relative error of about 1 / sqrt(2 n); three seeds are averaged.
    found, count = [], 0
    for seed in range(3):
        result = searched(Measured(sigma, seed=seed), strategy="nsga2", budget=150, seed=seed)
        noise = result.noise()
        assert noise["accuracy"].count == len(result.front)
        assert noise["size"].deviation == noise["size"].bias == 0
        found.append(noise["accuracy"].deviation ** 2)
        count += noise["accuracy"].count
    assert np.mean(found) ** 0.5 == pytest.approx(sigma, rel=3 / (2 * count) ** 0.5)


def test_the_winner_of_pure_noise_is_worse_the_second_time():
    # The best of 60 normal draws is 2.32 above the mean on average (its standard deviation: 0.44).
    gaps = []
    for seed in range(5):
        result = searched(
            Measured(sigma=1.0, signal=0, seed=seed),
            [nas.Maximize("accuracy")],
            budget=60,
            remeasure=5,
            seed=seed,
        )
        gaps.append(result.noise()["accuracy"].bias)
    assert np.mean(gaps) == pytest.approx(2.32, abs=3 * (0.44**2 + 1 / 5) ** 0.5 / 5**0.5)


def test_the_curse_has_the_same_sign_for_something_minimised():
    def error(architecture):
        return {"error": -evaluate(architecture)["accuracy"]}

    evaluate = Measured(sigma=1.0, signal=0)
    assert searched(error, [nas.Minimize("error")], budget=60).noise()["error"].bias > 0


def test_members_that_fall_behind_when_measured_again_are_named_and_stay():
    result = searched(Measured(sigma=3.0), budget=60, remeasure=2)
    again = {
        c.architecture.key: (np.mean([r["accuracy"] for r in c.repeats]), c.values["size"])
        for c in result.front
    }
    behind = {
        key
        for key, (accuracy, size) in again.items()
        if any(a >= accuracy and s <= size and (a, s) != (accuracy, size) for a, s in again.values())
    }
    assert {c.architecture.key for c in result.doubtful} == behind
    assert behind
    assert f"{len(behind)} of {len(result.front)} are dominated" in result.summary()


def test_a_deterministic_evaluation_is_measured_again_twice_and_no_more():
    evaluate = Measured()
    result = searched(evaluate, strategy="nsga2", budget=60, remeasure=3)
    assert len(result.front) > 2
    assert len(evaluate.asked) == 62
    assert result.noise()["accuracy"].deviation == 0
    assert not result.doubtful
    assert "the same to the last bit" in result.summary()


def test_costs_that_are_measured_are_measured_again_even_where_evaluation_is_deterministic():
    class Latency(Size):
        name, unit, is_measured = "latency", "ms", True

        def __init__(self):
            self.rng = np.random.default_rng(0)

        def __call__(self, architecture):
            return super().__call__(architecture) + 0.1 * self.rng.normal()

    evaluate = Measured()
    result = searched(
        evaluate, [nas.Maximize("accuracy"), nas.Minimize(Latency())], strategy="nsga2", budget=100
    )
    assert len(evaluate.asked) == 102
    noise = result.noise()
    assert noise["latency"].count == len(result.front) > 4
    assert noise["accuracy"].deviation == 0
    assert 0.03 < noise["latency"].deviation < 0.3


def test_a_search_killed_while_it_measures_again_goes_on_there(tmp_path):
    def fails(architecture):
        if len(evaluate.asked) == 43:
            raise KeyboardInterrupt
        return evaluate(architecture)

    evaluate = Measured(sigma=0.1)
    settings = {"storage": f"sqlite:///{tmp_path}/study.db", "remeasure": 2}
    with pytest.raises(KeyboardInterrupt) as caught:
        searched(fails, **settings)
    assert "40 finished evaluations are kept" in "".join(caught.value.__notes__)
    rest = Measured(sigma=0.1)
    result = searched(rest, **settings)
    assert len(rest.asked) == 2 * len(result.front) - 3
    assert all(len(c.repeats) == 2 for c in result.front)


def test_workers_measure_the_front_again_together():
    evaluate, storage = Measured(sigma=0.1), InMemoryStorage()
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: searched(evaluate, storage=storage, budget=20), range(3)))
    front = results[0].front
    assert len(evaluate.asked) == 20 + len(front)
    assert all(result.noise() == results[0].noise() for result in results)
    assert all(len(c.repeats) == 1 for c in front)


@pytest.mark.parametrize("times", [-1, 1.5, True])
def test_a_number_of_repetitions_that_cannot_be_is_refused(times):
    with pytest.raises(ValueError, match="remeasure is a number of times, 0 for none, got"):
        searched(remeasure=times)


# --- what is shown


def test_the_plot_has_lines_of_the_random_start_and_of_random_search_and_bars_of_noise():
    result = searched(Measured(sigma=0.5), strategy=NSGA2(population=10), baseline=True)
    (axes,) = result.plot().axes
    drawn = {line.get_label(): np.column_stack(line.get_data()).tolist() for line in axes.get_lines()}
    start = replace(result, candidates=result.candidates[:10])
    for label, part in (("random start", start), ("random search", result.baseline), ("front", result)):
        assert drawn[label] == [[c.values["size"], c.values["accuracy"]] for c in part.front]
    (bars,) = axes.containers
    half = result.noise()["accuracy"].deviation
    ends = [segment[:, 1].tolist() for segment in bars.lines[2][-1].get_segments()]
    expected = [[c.values["accuracy"] - half, c.values["accuracy"] + half] for c in result.front]
    np.testing.assert_allclose(ends, expected)


def test_the_plot_of_one_objective_has_lines_at_the_best_of_both():
    result = searched(objectives=[nas.Maximize("accuracy")], strategy=NSGA2(population=10), baseline=True)
    (axes,) = result.plot().axes
    levels = {line.get_label(): line.get_ydata()[0] for line in axes.get_lines()}
    assert levels["random start"] == max(c.values["accuracy"] for c in result.candidates[:10])
    assert levels["random search"] == max(c.values["accuracy"] for c in result.baseline.candidates)
    assert "best accuracy" in result.summary()


def test_a_result_without_any_of_it_still_has_a_summary():
    assert (
        searched(remeasure=0, budget=1).summary().splitlines()[0] == "1 candidates evaluated; 1 on the front."
    )
    empty = nas.search(SPACE, lambda a: {"x": float("nan")}, [nas.Maximize("x")], budget=2, storage="memory")
    assert "0 candidates evaluated, 2 failed" in empty.summary()
