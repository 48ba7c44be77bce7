"""Predictors against formulas written out, planted truths and published figures."""

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from sklearn.linear_model import Ridge as ReferenceRidge

from lightning_nas import predictors as P
from tests import macro_table

NAMES = ["ridge", "kernel-ridge", "svr", "gbdt", "mlp", "auto"]


def planted(n=120, d=12, noise=0.1, seed=0):
    """One-hot-like features; two of them matter together only."""
    rng = np.random.default_rng(seed)
    features = rng.integers(0, 2, (n, d)).astype(float)
    truth = features[:, :6] @ np.array([3.0, -2.0, 1.0, 0.5, 0.0, 0.0]) + 4 * features[:, 4] * features[:, 5]
    return features, 100 + 10 * (truth + noise * rng.standard_normal(n))


@pytest.mark.parametrize("name", NAMES)
def test_every_predictor_orders_a_planted_truth_and_nothing_where_there_is_nothing(name):
    features, targets = planted(300)
    fitted = P.predictors[name]().fit(features[:200], targets[:200])
    quality = P.quality_of(fitted.predict(features[200:]).mean, targets[200:])
    assert quality.kendall > (0.6 if name == "ridge" else 0.75)  # a line knows no pairs
    assert quality.mae < 0.6 * np.abs(targets[200:] - targets[:200].mean()).mean()
    shuffled = np.random.default_rng(1).permutation(targets[:200])
    chance = P.predictors[name]().fit(features[:200], shuffled).predict(features[200:]).mean
    # Kendall's tau of 100 independent pairs has a standard error of 0.068.
    assert abs(scipy.stats.kendalltau(chance, targets[200:]).statistic) < 0.27


@pytest.mark.parametrize("name", ["ridge", "kernel-ridge", "mlp", "gbdt"])
def test_the_unit_of_the_targets_does_not_matter(name):
    features, targets = planted(60)
    mean, std = P.predictors[name]().fit(features, targets).predict(features[:9])
    other_mean, other_std = P.predictors[name]().fit(features, 1e6 * targets - 5).predict(features[:9])
    np.testing.assert_allclose(other_mean, 1e6 * mean - 5, rtol=1e-4)
    np.testing.assert_allclose(other_std, 1e6 * std, rtol=2e-2)


def test_ridge_is_scikit_learns_and_its_leave_one_out_error_that_of_leaving_each_out():
    features, targets = planted(40)
    fitted = P.Ridge(alphas=(2.0,)).fit(features, targets)
    reference = ReferenceRidge(alpha=2.0).fit(features, targets)
    np.testing.assert_allclose(fitted.predict(features).mean, reference.predict(features))
    errors = {}
    for alpha in (0.01, 1.0, 50.0):
        out = []
        for i in range(40):
            rest = np.arange(40) != i
            guess = (
                ReferenceRidge(alpha=alpha).fit(features[rest], targets[rest]).predict(features[i : i + 1])
            )
            out.append((guess[0] - targets[i]) ** 2)
        errors[alpha] = np.mean(out)
    assert P.Ridge(alphas=tuple(errors)).fit(features, targets).alpha == min(errors, key=errors.get)


def test_kernel_ridge_is_the_mean_and_the_spread_of_a_gaussian_process():
    features, targets = planted(50)
    new = planted(10, seed=3)[0]
    fitted = P.KernelRidge(widths=(1.5,), alphas=(0.05,)).fit(features, targets)
    distances = [
        ((a - b) ** 2).sum() for i, a in enumerate(features) for j, b in enumerate(features) if i != j
    ]
    length = 1.5 * np.sqrt(np.mean(distances))
    scaled = (targets - targets.mean()) / targets.std()
    process = GaussianProcessRegressor(RBF(length, "fixed"), alpha=0.05, optimizer=None).fit(features, scaled)
    mean, std = process.predict(new, return_std=True)
    found = fitted.predict(new)
    np.testing.assert_allclose(found.mean, targets.mean() + targets.std() * mean)
    inverse = np.linalg.inv(process.kernel_(features) + 0.05 * np.eye(50))
    signal = scaled @ inverse @ scaled / 50  # maximum likelihood
    np.testing.assert_allclose(found.std, targets.std() * np.sqrt(signal * (std**2 + 0.05)))


@pytest.mark.parametrize("name", ["ridge", "kernel-ridge", "mlp", "gbdt"])
def test_a_predictor_is_less_sure_far_from_what_it_has_seen(name):
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.integers(0, 2, (80, 4)), np.zeros((80, 8))], axis=1).astype(float)
    targets = features[:, :4] @ np.array([3.0, 1.0, -2.0, 0.5]) + 0.3 * rng.standard_normal(80)
    near, far = features[:20], np.concatenate([features[:20, :4], np.ones((20, 8))], axis=1)
    fitted = P.predictors[name]().fit(features, targets)
    if name == "gbdt":  # trees never split where nothing varied; they are unsure where rows are noisy
        assert (fitted.predict(near).std > 0).all()
    else:
        assert fitted.predict(far).std.mean() > 1.5 * fitted.predict(near).std.mean()


def test_contributions_of_trees_sum_to_the_prediction():
    features, targets = planted()
    trees = P.GBDT().fit(features, targets)
    values = trees.contributions(features)
    assert values.shape == (120, 13)
    np.testing.assert_allclose(values.sum(1), trees.predict(features).mean, rtol=1e-6)


def test_members_of_the_ensemble_learn_as_if_each_were_alone():
    features, targets = planted(30)
    both = P.MLPEnsemble(members=2, steps=20)
    both.fit(features, targets)
    scaled = torch.tensor((targets - targets.mean()) / targets.std(), dtype=torch.float32)
    x = torch.tensor(features, dtype=torch.float32)
    start = P.MLPEnsemble(members=2, steps=1, lr=1e-30).fit(features, targets)._layers
    each = []
    for member in range(2):
        weights = [
            torch.nn.Parameter(t[member].detach().clone())
            for layer in start
            for t in (layer.weight, layer.bias)
        ]
        optimizer = torch.optim.AdamW(weights, 3e-3, weight_decay=0.01)
        for _ in range(20):
            hidden = (x @ weights[0] + weights[1]).relu()
            hidden = (hidden @ weights[2] + weights[3]).relu()
            optimizer.zero_grad()
            torch.nn.functional.huber_loss((hidden @ weights[4] + weights[5])[:, 0], scaled).backward()
            optimizer.step()
        hidden = ((x @ weights[0] + weights[1]).relu() @ weights[2] + weights[3]).relu()
        each.append((hidden @ weights[4] + weights[5])[:, 0].detach().numpy())
    expected = targets.mean() + targets.std() * np.mean(each, axis=0)
    np.testing.assert_allclose(both.predict(features).mean, expected, rtol=1e-4)


def test_the_ensemble_learns_the_same_whatever_modes_the_caller_is_in():
    features, targets = planted(30)
    expected = P.MLPEnsemble(steps=20).fit(features, targets).predict(features).mean
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found = P.MLPEnsemble(steps=20).fit(features, targets).predict(features).mean
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(found, expected)
    with torch.no_grad():
        np.testing.assert_array_equal(
            P.MLPEnsemble(steps=20).fit(features, targets).predict(features).mean, found
        )


def macro():
    """One of each network that differs, with features, accuracies and the logarithm of its operations."""
    rows = {}
    for architecture in macro_table.SPACE.enumerate():
        rows.setdefault(macro_table.table()[macro_table.digits(architecture)], architecture)
    features = macro_table.SPACE.encode(rows.values())
    accuracy, operations = np.array(list(rows)).T
    return features, accuracy, np.log(operations)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "published"),
    [("ridge", 100, 0.778), ("gbdt", 100, 0.774), ("gbdt", 250, 0.844), ("auto", 250, 0.844)],
)
def test_rank_correlations_on_nas_bench_macro_are_those_published_or_better(name, count, published):
    features, accuracy, _ = macro()
    found = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(accuracy))
        fitted = P.predictors[name]().fit(features[order[:count]], accuracy[order[:count]])
        rest = order[count:]
        found.append(P.quality_of(fitted.predict(features[rest]).mean, accuracy[rest]).kendall)
    assert np.mean(found) > published - 0.01  # over seeds the mean has a standard error of about 0.005


@pytest.mark.slow
def test_learning_operations_first_helps_with_few_rows():
    """20 rows of NAS-Bench-MACRO: better than from scratch in 10 of 10 seeds, as computed outside."""
    features, accuracy, operations = macro()
    wins = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        order, free = rng.permutation(len(accuracy)), rng.permutation(len(accuracy))[:1000]
        few, rest = order[:20], order[20:]
        pretrained = P.MLPEnsemble(members=1, seed=seed).pretrain(features[free], operations[free, None])
        taus = [
            P.quality_of(
                p.fit(features[few], accuracy[few]).predict(features[rest]).mean, accuracy[rest]
            ).kendall
            for p in (pretrained, P.MLPEnsemble(members=1, seed=seed))
        ]
        wins += taus[0] > taus[1]
    assert wins >= 8


def test_update_adds_rows_to_those_it_has():
    features, targets = planted(60)
    whole = P.Ridge().fit(features, targets).predict(features).mean
    grown = P.Ridge().update(features[:20], targets[:20]).update(features[20:], targets[20:])
    np.testing.assert_array_equal(grown.predict(features).mean, whole)


def test_the_automatic_choice_is_the_kind_whose_cross_validated_order_is_best():
    features, targets = planted(200)
    fitted = P.Automatic(("ridge", "kernel-ridge")).fit(features, targets)
    tau = {
        name: P.cross_validated(P.predictors[name], features, targets).kendall
        for name in ("ridge", "kernel-ridge")
    }
    assert fitted.chosen == max(tau, key=tau.get) == "kernel-ridge"  # two features matter together only
    assert P.Automatic().fit(features[:3], targets[:3]).chosen == "ridge"  # too few rows to tell


def test_the_automatic_choice_is_that_of_the_first_rows_up_to_a_power_of_two():
    features, targets = planted(127)
    validated = P.cross_validated(P.KernelRidge, features[:64], targets[:64])
    for rows in (64, 100, 127):
        fitted = P.Automatic(("ridge", "kernel-ridge")).fit(features[:rows], targets[:rows])
        assert fitted.qualities["kernel-ridge"] == validated
        everything = P.predictors[fitted.chosen]().fit(features[:rows], targets[:rows])
        np.testing.assert_allclose(fitted.predict(features).mean, everything.predict(features).mean)


def test_measures_of_quality_on_a_case_by_hand():
    quality = P.quality_of([1, 2, 3, 4], [10, 30, 20, 40])
    assert quality.kendall == pytest.approx((5 - 1) / 6)
    assert quality.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert quality.mae == pytest.approx((9 + 28 + 17 + 36) / 4)
    assert quality.regret == 0
    assert P.quality_of([1, 2, 3], [10, 30, 20]).regret == 10
    assert P.quality_of([1, 2, 3], [10, 30, 20], top=2).regret == 0
    assert P.quality_of([3, 1, 2], [10, 30, 5], larger_is_better=False).regret == 25
    assert np.isnan(P.quality_of([1, 1], [1, 2]).kendall)


def test_each_row_is_predicted_without_its_fold():
    class Remembers(P.Predictor):
        def _fit(self, features, targets):
            self.rows = {tuple(row) for row in features}

        def _predict(self, features):
            asked.extend(tuple(row) for row in features)
            assert not self.rows & {tuple(row) for row in features}
            return P.Prediction(np.zeros(len(features)), None)

    asked = []
    features = np.arange(20.0)[:, None]
    P.cross_validated(Remembers, features, np.arange(20.0))
    assert sorted(asked) == [(float(i),) for i in range(20)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: P.Ridge().fit([[1.0]], [1.0]), "at least two rows are needed to learn from, got 1"),
        (lambda: P.Ridge().fit([[1.0], [2.0]], [1.0]), r"targets \(n,\), got \(2, 1\) and \(1,\)"),
        (lambda: P.Ridge().fit([[1.0], [2.0]], [1.0, np.nan]), "1 of 2 targets are not finite"),
        (lambda: P.Ridge().predict([[1.0]]), r"Ridge: call fit\(features, targets\) first"),
        (lambda: P.Ridge().fit(np.eye(3), np.ones(3)).predict(np.eye(2)), "fitted on 3 features, got"),
        (lambda: P.Ridge().fit(np.eye(3), np.ones(3)).update(np.eye(2), np.ones(2)), "fitted on 3 features"),
        (lambda: P.Ridge(alphas=()), "alphas must be above 0, at least one"),
        (lambda: P.KernelRidge(widths=(0,)), "widths must be above 0"),
        (lambda: P.SVR(folds=1), "folds at least 2"),
        (lambda: P.GBDT(leaves=1), "leaves at least 2"),
        (lambda: P.MLPEnsemble(frozen=1), r"frozen in \[0, 1\)"),
        (lambda: P.MLPEnsemble().pretrain(np.eye(3), np.ones(3)), r"statistics \(n, k\), got"),
        (lambda: P.MLPEnsemble(2).pretrain(np.eye(4), np.eye(4), 2).fit(np.eye(3), [1, 2, 3]), "on 4 feat"),
        (lambda: P.Automatic(("auto",)), "must name predictors other than 'auto'"),
        (lambda: P.Automatic(("ridg",)), "Did you mean 'ridge'"),
        (lambda: P.cross_validated(P.Ridge, np.eye(3), np.ones(3)), "at least 4 rows"),
        (lambda: P.quality_of([1.0], [1.0]), "same length, at least 2"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_value(call, message):
    with pytest.raises((ValueError, KeyError), match=message):
        call()


def test_a_constant_target_is_predicted_as_it_is():
    features, _ = planted(30)
    for name in NAMES:
        mean = P.predictors[name]().fit(features, np.full(30, 7.0)).predict(features[:3]).mean
        np.testing.assert_allclose(mean, 7.0, atol=1e-2)
