import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_nas.errors import StudyMismatchError
from lightning_nas.objectives import Maximize, Minimize
from lightning_nas.scalarizations import AbsoluteReward, Chebyshev, HingeReward, MnasNetReward
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.study import search

HARD = {"alpha": 0.0, "beta": -1.0}
POSITIVE = st.floats(0.01, 100)


@pytest.mark.parametrize(
    ("exponents", "latency", "reward"),
    [
        ({}, 75.0, 0.75),
        ({}, 150.0, 0.71448),
        ({}, 37.5, 0.78729),
        (HARD, 75.0, 0.75),
        (HARD, 150.0, 0.375),
        (HARD, 37.5, 0.75),
    ],
)
def test_mnasnet_reward_gives_the_published_trade(exponents, latency, reward):
    of = MnasNetReward("accuracy", "latency", target=75, **exponents)
    assert of({"accuracy": 0.75, "latency": latency}) == pytest.approx(reward, abs=5e-6)


def test_a_twentieth_more_accuracy_is_worth_twice_the_cost():
    of = MnasNetReward("accuracy", "latency", target=75)
    base, twice = of({"accuracy": 0.6, "latency": 50}), of({"accuracy": 0.63, "latency": 100})
    assert twice / base == pytest.approx(1.0003, abs=1e-4)  # 1.05 * 2 ** -0.07


def test_hinge_and_absolute_reward_differ_below_the_target_alone():
    hinge, absolute = (kind("a", "c", target=10, weight=0.5) for kind in (HingeReward, AbsoluteReward))
    assert [of({"a": 0.8, "c": 20.0}) for of in (hinge, absolute)] == pytest.approx([0.3, 0.3])
    assert [of({"a": 0.8, "c": 5.0}) for of in (hinge, absolute)] == pytest.approx([0.8, 0.55])


@given(accuracy=POSITIVE, cost=POSITIVE, more=st.floats(1.0, 10.0))
def test_no_bounding_reward_prefers_the_dearer_of_two_equally_accurate_networks(accuracy, cost, more):
    rewards = [
        MnasNetReward("a", "c", 10),
        MnasNetReward("a", "c", 10, **HARD),
        HingeReward("a", "c", 10, weight=0.1),
    ]
    for of in rewards:
        assert of({"a": accuracy, "c": cost * more}) <= of({"a": accuracy, "c": cost}) + 1e-9


def test_chebyshev_reaches_the_point_of_a_front_that_no_weighted_sum_reaches():
    front = np.array([(0.0, 1.0), (0.6, 0.6), (1.0, 0.0)])  # the middle bends inwards
    of = Chebyshev(("x", "y"), weights=(1, 1), ideal=(0, 0))
    assert np.argmin([of({"x": x, "y": y}) for x, y in front]) == 1
    assert all(np.argmin(front @ (w, 1 - w)) != 1 for w in np.linspace(0, 1, 101))


@pytest.mark.parametrize(
    "of",
    [
        MnasNetReward("a", "c", 1),
        HingeReward("a", "c", 1),
        AbsoluteReward("a", "c", 1),
        Chebyshev(("a", "c"), (1, 1), (0, 0)),
    ],
)
def test_a_value_that_is_not_a_number_gives_none(of):
    assert math.isnan(of({"a": math.nan, "c": 2.0}))
    assert math.isnan(of({"a": 1.0, "c": math.nan}))


SPACE = SearchSpace([Choice("width", (1, 2, 3, 4)), Choice("depth", (1, 2, 3))])


class Macs:
    name, unit = "macs", "MAC"

    def __call__(self, architecture):
        return 10.0 * architecture["width"] * architecture["depth"]


MACS = Macs()


def measure(architecture):
    return {"accuracy": 1 - 0.5 / (architecture["width"] + 2 * architecture["depth"])}


def found(objectives, **settings):
    settings = {"budget": 12, "storage": "memory", "progress": False, **settings}
    return search(SPACE, measure, objectives, **settings)


@pytest.mark.parametrize(("target", "exponents"), [(40, {}), (40, HARD), (5, HARD), (200, HARD)])
def test_a_search_maximises_the_reward(target, exponents):
    reward = MnasNetReward("accuracy", MACS, target=target, **exponents)
    best = found([Maximize(reward)]).best(reward.name)

    def by_hand(architecture):
        macs, w = MACS(architecture), exponents or {"alpha": -0.07, "beta": -0.07}
        return measure(architecture)["accuracy"] * (macs / target) ** w["alpha" if macs <= target else "beta"]

    assert best.values[reward.name] == pytest.approx(max(map(by_hand, SPACE.enumerate())))
    assert best.values["macs"] == MACS(best.architecture)  # the parts are kept beside it
    assert best.values["accuracy"] == measure(best.architecture)["accuracy"]


def test_a_front_beside_a_reward_is_sorted_by_its_cost():
    result = found([Maximize(MnasNetReward("accuracy", MACS, 40)), Minimize(MACS)])
    macs = [c.values["macs"] for c in result.front]
    assert macs == sorted(macs)


def test_a_reward_with_another_target_is_another_study(tmp_path):
    found([Maximize(MnasNetReward("accuracy", MACS, 40))], storage=tmp_path / "s.log")
    again = found([Maximize(MnasNetReward("accuracy", MACS, 40))], storage=tmp_path / "s.log", budget=12)
    assert len(again.candidates) == 12
    with pytest.raises(StudyMismatchError, match=r"macs / 40.*macs / 40\.5"):
        found([Maximize(MnasNetReward("accuracy", MACS, 40.5))], storage=tmp_path / "s.log")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MnasNetReward("a", "c", target=0), ValueError, "target.*above 0.*got 0"),
        (lambda: MnasNetReward("a", "c", 1, beta=0.07), ValueError, r"beta.*at most 0, got 0\.07"),
        (lambda: MnasNetReward("a", 3, 1), TypeError, "MnasNetReward: expected the name.*got 3"),
        (lambda: MnasNetReward("a", "c", 1)({"a": 1, "c": -2}), ValueError, "c must be above 0, got -2"),
        (lambda: HingeReward("a", "c", 1, weight=-1), ValueError, "HingeReward: weight.*got -1"),
        (lambda: Chebyshev(("a", "c"), (1,), (0, 0)), ValueError, "one entry each.*got 2, 1 and 2"),
        (lambda: Chebyshev(("a",), (0,), (0,)), ValueError, r"weights must be above 0.*got \(0,\)"),
        (lambda: found([Maximize(MnasNetReward("acc", MACS, 9))]), ValueError, "returned no 'acc'.*accuracy"),
        (
            lambda: found(
                [Maximize("accuracy")], constraints={MnasNetReward("accuracy", MACS, 9): (">=", 0)}
            ),
            TypeError,
            "cannot be bounded itself",
        ),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
