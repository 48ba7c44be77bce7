import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_nas.evaluation import expected_best_of, kendall_tau, precision_at, regret, spearman
from tests import macro_table

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=2, max_size=6)


def test_kendall_tau_is_concordant_less_discordant_pairs_with_ties_corrected():
    a, b = np.array([1, 2, 2, 3, 5, 4]), np.array([1, 3, 2, 2, 6, 6])
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in itertools.combinations(range(6), 2)]
    s = sum(x * y for x, y in signs)
    oracle = s / math.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs))
    assert kendall_tau(a, b) == pytest.approx(oracle)


def test_spearman_is_the_correlation_of_mean_ranks():
    a, b = [10, 20, 20, 40], [1, 3, 2, 4]
    assert spearman(a, b) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])


def test_correlations_know_no_scale_and_are_nan_for_a_constant():
    values = np.random.default_rng(0).random(20)
    for measure in (kendall_tau, spearman):
        assert measure(np.exp(9 * values), values) == pytest.approx(1)
        assert measure(-values, values) == pytest.approx(-1)
        assert math.isnan(measure(np.zeros(20), values))


@given(pairs=PAIRS, k=st.integers(1, 2))
def test_precision_and_regret_are_means_over_the_orders_of_equal_predictions(pairs, k):
    guess, truth = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    best = truth >= sorted(truth)[-k]
    orders = [
        list(order[:k])
        for order in itertools.permutations(range(len(guess)))
        if all(guess[i] >= guess[j] for i, j in itertools.pairwise(order))
    ]
    assert precision_at(k, guess, truth) == pytest.approx(np.mean([best[o].mean() for o in orders]))
    missing = np.mean([truth.max() - truth[o].max() for o in orders])
    assert regret(k, guess, truth) == pytest.approx(missing)


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_expected_best_is_the_mean_over_every_draw(n):
    values = [3.0, 1.0, 1.0, 7.0, -2.0]
    without = [max(drawn) for drawn in itertools.combinations(values, n)]
    again = [max(drawn) for drawn in itertools.product(values, repeat=n)]
    assert expected_best_of(n, values) == pytest.approx(np.mean(without))
    assert expected_best_of(n, values, replacement=True) == pytest.approx(np.mean(again))


@pytest.mark.parametrize(("n", "best"), [(10, 92.433), (50, 92.774), (250, 92.964), (6561, 93.1267)])
def test_expected_best_of_nas_bench_macro_is_as_computed_elsewhere(n, best):
    accuracies = [accuracy for accuracy, _ in macro_table.table().values()]
    assert expected_best_of(n, accuracies) == pytest.approx(best, abs=6e-4)


def test_expected_best_of_a_large_table_keeps_its_digits():
    size, n = 200_000, 1_000
    # The mean of the largest of n of the numbers 1 to N is n (N + 1) / (n + 1).
    assert expected_best_of(n, np.arange(1, size + 1)) == pytest.approx(n * (size + 1) / (n + 1), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kendall_tau([1, 2], [1, 2, 3]), r"kendall_tau.*same length.*\(2,\) and \(3,\)"),
        (lambda: spearman([1], [1]), "spearman.*at least 2"),
        (lambda: spearman([1, math.nan], [1, 2]), "must be finite"),
        (lambda: precision_at(3, [1, 2], [1, 2]), "k must be from 1 to the number of values, 2, got 3"),
        (lambda: regret(0, [1, 2], [1, 2]), "regret: k must be.*got 0"),
        (lambda: expected_best_of(3, [1, 2]), "at most the 2 values, got 3"),
        (lambda: expected_best_of(1, []), "at least one number"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
