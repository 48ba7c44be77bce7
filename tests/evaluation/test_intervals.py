import math

import numpy as np
import pytest

from lightning_nas.evaluation import difference_of_means, mean_and_interval, relative_improvement

# Top-1 accuracies of eight random and eight searched networks on CIFAR10; Yang et al., ICLR 2020.
DARTS = (
    [97.05, 96.85, 96.57, 97.09, 96.76, 97.10, 96.94, 97.02],
    [97.47, 97.15, 97.41, 97.05, 96.93, 97.13, 97.40, 97.34],
)
NSGANET = (
    [97.07, 96.78, 96.49, 97.04, 97.08, 95.80, 96.28, 96.60],
    [95.61, 96.29, 95.39, 95.67, 95.52, 96.67, 97.18, 97.11],
)
ENAS = (
    [95.78, 95.64, 96.08, 95.12, 96.05, 95.99, 96.09, 96.00],
    [95.64, 96.10, 95.18, 95.84, 96.32, 95.95, 95.86, 95.94],
)


@pytest.mark.parametrize(("groups", "percent"), [(DARTS, 0.32), (NSGANET, -0.48), (ENAS, 0.01)])
def test_relative_improvement_is_that_of_the_published_runs(groups, percent):
    random, searched = groups
    assert relative_improvement(searched, random).estimate == pytest.approx(percent, abs=0.005)


def test_relative_improvement_knows_no_scale_and_no_order_but_an_offset():
    random, searched = map(np.array, DARTS)
    whole = relative_improvement(searched, random)
    scaled = relative_improvement(searched / 100, random / 100)
    assert (scaled.estimate, scaled.low, scaled.high) == pytest.approx(
        (whole.estimate, whole.low, whole.high)
    )
    assert relative_improvement(searched[::-1], random[::-1]).estimate == pytest.approx(whole.estimate)
    assert relative_improvement(searched - 50, random - 50).estimate > 2 * whole.estimate
    assert whole.excludes(0)
    assert not relative_improvement(*ENAS).excludes(0)


@pytest.mark.parametrize("method", ["student", "bootstrap", "ratio", "difference"])
def test_intervals_hold_the_truth_as_often_as_they_say(method):
    rng, hits, rounds = np.random.default_rng(0), 0, 150
    for _ in range(rounds):
        first, second = rng.normal(3, 0.3, 30), rng.normal(2, 0.1, 20)
        interval, truth = {
            "student": lambda x=first: (mean_and_interval(x), 3.0),
            "bootstrap": lambda x=first: (mean_and_interval(x, method="bootstrap"), 3.0),
            "ratio": lambda x=first, y=second: (relative_improvement(x, y), 50.0),
            "difference": lambda x=first, y=second: (difference_of_means(x, y), 1.0),
        }[method]()
        hits += not interval.excludes(truth)
    # Of 150 at 0.95: 142.5, standard deviation 2.7. Percentiles are a little too narrow at 20 and 30 values.
    assert 133 <= hits <= 149


def test_students_interval_is_that_of_the_table():
    # The 97.5 % quantile with 4 degrees of freedom is 2.7764; the standard error of 1 to 5 is sqrt(0.5).
    interval = mean_and_interval([1, 2, 3, 4, 5])
    assert interval.high - interval.estimate == pytest.approx(2.7764 * math.sqrt(0.5), abs=1e-4)


def test_welchs_interval_is_that_of_two_equal_groups_by_hand():
    # Equal sizes and spreads: 2 * 4 degrees of freedom, the quantile of which is 2.3060.
    interval = difference_of_means([2, 3, 4, 5, 6], [1, 2, 3, 4, 5])
    assert interval.estimate == pytest.approx(1)
    assert interval.high - 1 == pytest.approx(2.3060 * math.sqrt(2 * 0.5), abs=1e-4)


def test_one_run_says_nothing_about_the_spread_and_equal_runs_say_all():
    assert (mean_and_interval([5.0]).low, mean_and_interval([5.0]).high) == (-math.inf, math.inf)
    assert difference_of_means([5.0], [1.0, 2.0]).high == math.inf
    assert relative_improvement([5.0], [1.0, 2.0]).low == -math.inf
    for method in ("student", "bootstrap"):
        same = mean_and_interval([5.0, 5.0, 5.0], method=method)
        assert (same.low, same.high) == (5, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relative_improvement([], [1.0]), "searched must be a list.*at least one"),
        (lambda: relative_improvement([1.0], []), "random must be a list.*at least one"),
        (lambda: relative_improvement([1.0], [-1.0, 1.0]), "above 0 to divide by, got 0"),
        (lambda: mean_and_interval([1.0, math.inf]), "must be finite, got inf"),
        (lambda: mean_and_interval([1.0], confidence=95), "between 0 and 1, as 0.95, got 95"),
        (lambda: mean_and_interval([1.0], method="t"), "'student' or 'bootstrap', got 't'"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
