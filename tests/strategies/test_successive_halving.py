"""Successive halving where the value of every candidate on every share of the data is planted."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from optuna.storages import InMemoryStorage

import lightning_nas as nas
from lightning_nas.strategies import LINAS, SuccessiveHalving
from lightning_nas.strategies.successive_halving import rungs

SPACE = nas.SearchSpace([nas.Choice(f"digit{i}", tuple(range(10))) for i in range(4)])
GAIN = [nas.Maximize("gain")]
SHARES = (1 / 9, 1 / 3, 1.0)


def arm_of(architecture):
    return sum(digit * 10**i for i, digit in enumerate(architecture.values()))


def value(arm):
    return float(np.random.default_rng(arm).normal())


class Arms:
    """Arms whose curves never cross; measured on a share with noise that falls with it."""

    def __init__(self, sigma=0.0, dies_after=None):
        self.sigma, self.calls, self.dies_after = sigma, [], dies_after

    def __call__(self, architecture, share=1.0):
        if len(self.calls) == self.dies_after:
            raise KeyboardInterrupt
        arm = arm_of(architecture)
        self.calls.append((arm, share))
        noise = self.sigma * (1 / share - 1) ** 0.5 * value(arm + 10_000)
        return {"gain": value(arm) - 1 / share + noise}

    def on(self, share):
        return [arm for arm, s in self.calls if s == share]


def found(evaluate, budget=30, strategy="successive-halving", objectives=GAIN, space=SPACE, **settings):
    settings = {"storage": "memory", "progress": False, "remeasure": 0, **settings}
    return nas.search(space, evaluate, objectives, strategy=strategy, budget=budget, **settings)


def test_rungs_of_81_candidates_are_81_27_9_3_1_and_a_bracket_costs_no_more_than_its_share():
    assert rungs(81, 1, 81, 3) == [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)]
    for s, n in enumerate((5, 8, 15, 34, 81)):  # Hyperband's brackets, each within (s_max + 1) R
        assert sum(count * each for count, each in rungs(n, 81 // 3**s, 81, 3)) <= 5 * 81


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("settings", [{}, {"eta": 2, "steps": 4}])
def test_the_budget_is_counted_in_whole_evaluations_and_never_exceeded(budget, settings):
    arms = Arms()
    result = found(arms, budget, SuccessiveHalving(**settings))
    spent = math.fsum(share for _, share in arms.calls)
    assert budget - 1 < spent <= budget + 1e-9
    assert [arm_of(c.architecture) for c in result.candidates] == arms.on(1.0)
    assert result.candidates
    assert max(Counter(arms.calls).values()) == 1


def test_rungs_fill_as_the_best_third_is_promoted():
    arms = Arms()
    found(arms, 60)
    low, middle, top = (arms.on(share) for share in SHARES)
    assert set(top) <= set(middle) <= set(low)
    # Every one in the best third is promoted at once; those that fell out of it later are extra.
    assert len(low) // 3 <= len(middle) <= len(low) // 3 + 3 * math.isqrt(len(low))
    assert len(middle) // 3 <= len(top) <= len(middle) // 3 + 3 * math.isqrt(len(middle))


def test_the_best_arm_survives_where_curves_never_cross():
    arms = Arms()
    best = found(arms, 40).best("gain").architecture
    assert arm_of(best) == max(arms.on(1 / 9), key=value)


def test_one_worker_promotes_what_the_synchronous_rule_would_and_some_that_were_ahead_at_the_time():
    arms = Arms()
    found(arms, 60)
    begun, promoted = [], []
    for arm, share in arms.calls:
        if share == 1 / 9:
            begun.append(arm)
        elif share == 1 / 3:
            third = sorted(begun, key=value, reverse=True)[: len(begun) // 3]
            assert arm in third
            promoted.append(arm)
    count = len(begun) // 27 * 27
    final = sorted(begun[:count], key=value, reverse=True)[: count // 3]  # the synchronous rung
    early = set(promoted) - set(final)
    assert set(final) <= {*promoted}
    # The known difference: some 5 percent of the arms are promoted before better ones came.
    assert 0 < len(early) < 0.15 * len(begun)


def test_a_search_killed_again_and_again_keeps_its_rungs(tmp_path):
    whole = Arms()
    expected = found(whole, 12)
    calls = []
    for _ in range(30):
        part = Arms(dies_after=5)
        try:
            result = found(part, 12, storage=tmp_path / "study.log")
        except KeyboardInterrupt:
            calls += part.calls
        else:
            calls += part.calls
            break
    assert calls == whole.calls
    assert result.candidates == expected.candidates


def test_workers_share_rungs_and_budget():
    arms = Arms()
    storage = InMemoryStorage()
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: found(arms, 12, storage=storage), range(3)))
    assert 10 < math.fsum(share for _, share in arms.calls) <= 12 + 1e-9
    assert max(Counter(arms.calls).values()) == 1
    assert set(arms.on(1.0)) <= set(arms.on(1 / 3)) | set(arms.on(1 / 9))
    for result in results:
        assert sorted(arm_of(c.architecture) for c in result.candidates) == sorted(arms.on(1.0))


@pytest.mark.slow
def test_successive_halving_beats_random_search_at_equal_cost_where_a_part_tells_enough():
    # The best of n draws varies much. Four rungs draw 27 for what 4 whole evaluations cost, and the best of
    # 6.75 n is above the best of n clearly enough for ten seeds; the best of 3 n, by three rungs, is not.
    gains = []
    for seed in range(10):
        strategies = (SuccessiveHalving(steps=4), "random")
        halving, random = (found(Arms(0.1), 20, strategy, seed=seed) for strategy in strategies)
        gains.append(halving.best("gain").values["gain"] - random.best("gain").values["gain"])
    interval = nas.evaluation.mean_and_interval(gains, 0.95)
    assert interval.low > 0


WIDTHS = nas.SearchSpace([nas.Choice(f"{i}.width", tuple(range(1, 9))) for i in range(5)])


class Size:
    name, unit = "size", "units"

    def __call__(self, architecture):
        return float(sum(architecture.values()))


def accuracy(architecture, share=1.0):
    rng = np.random.default_rng([*architecture.values(), round(9 * share)])
    true = sum(width**0.5 * (i - 1) for i, width in enumerate(architecture.values()))
    return {"accuracy": true + 0.2 * (1 / share - 1) ** 0.5 * rng.normal()}


@pytest.mark.slow
def test_fronts_of_two_objectives_within_constraints_are_ahead_of_random_search():
    size, gains = Size(), []
    for seed in range(10):
        settings = {
            "objectives": [nas.Maximize("accuracy"), nas.Minimize(size)],
            "constraints": {size: ("<=", 25)},
            "space": WIDTHS,
            "seed": seed,
        }
        halving, random = (found(accuracy, 40, s, **settings) for s in ("successive-halving", "random"))
        assert all(c.values["size"] <= 25 for c in halving.candidates)
        reference = {"accuracy": -2.0, "size": 26.0}
        gains.append(halving.hypervolume(reference) - random.hypervolume(reference))
    assert nas.evaluation.mean_and_interval(gains, 0.95).low > 0


def test_what_breaks_a_measured_constraint_on_a_part_is_promoted_last():
    promoted = []

    def evaluate(architecture, share=1.0):
        if share == 1 / 3:
            promoted.append(architecture["digit0"] % 2)
        return {"gain": value(arm_of(architecture)), "odd": float(architecture["digit0"] % 2)}

    found(evaluate, 40, constraints={"odd": ("<=", 0.5)})
    assert len(promoted) > 10
    assert not any(promoted)


def test_an_initial_architecture_is_evaluated_whole():
    arms = Arms()
    found(arms, 10, initial=[{f"digit{i}": d for i in range(4)} for d in (7, 9)])
    assert arms.calls[:2] == [(7777, 1.0), (9999, 1.0)]


def test_a_part_that_gives_no_number_fails_its_candidate_and_costs_its_share():
    calls = []

    def evaluate(architecture, share=1.0):
        arm = arm_of(architecture)
        calls.append((arm, share))
        return {"gain": math.nan if arm % 2 else value(arm)}

    result = found(evaluate, 12)
    assert math.fsum(share for _, share in calls) <= 12 + 1e-9
    assert {arm_of(f.architecture) for f in result.failed} == {arm for arm, _ in calls if arm % 2}
    assert all(share == 1 / 9 for arm, share in calls if arm % 2)


@pytest.mark.parametrize("strategy", [LINAS(predictor="ridge", evaluations=200), "nsga2", "tpe", "evolution"])
def test_another_strategy_goes_on_from_the_whole_evaluations_alone(strategy, tmp_path):
    def measure(arms, storage, budget, strategy):
        return found(arms, budget, strategy, storage=storage, space=WIDTHS)

    class Widths(Arms):
        def __call__(self, architecture, share=1.0):
            self.calls.append((architecture.key, share))
            return {"gain": accuracy(architecture, share)["accuracy"]}

    before, after = Widths(), Widths()
    measure(before, tmp_path / "s", 12, "successive-halving")
    spent = math.fsum(share for _, share in before.calls)
    result = measure(after, tmp_path / "s", 40, strategy)
    assert len(after.calls) == math.floor(40 - spent + 1e-9)
    assert {share for _, share in after.calls} == {1.0}
    assert len(result.candidates) == sum(share == 1 for _, share in before.calls + after.calls)


def test_an_evaluation_that_takes_no_share_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"evaluate must take it: def evaluate\(architecture, share=1.0\)"):
        found(lambda architecture: {"gain": 1.0})
    with pytest.raises(ValueError, match="whole evaluations are counted"):
        nas.compare(["successive-halving"], SPACE, Arms(), GAIN, budget=5, storage="memory")


@pytest.mark.parametrize("settings", [{"eta": 1}, {"steps": 1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="eta and steps must be at least 2"):
        SuccessiveHalving(**settings)
