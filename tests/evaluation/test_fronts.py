import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_nas.evaluation import hypervolume, hypervolume_curve, igd_plus

POINTS = arrays(np.float64, st.tuples(st.integers(1, 8), st.just(2)), elements=st.integers(0, 5).map(float))


def missed(losses, front):
    """The definition in plain Python."""
    by_point = [
        min(sum(max(a - z, 0) ** 2 for a, z in zip(p, f, strict=True)) ** 0.5 for p in losses) for f in front
    ]
    return sum(by_point) / len(by_point)  # fmt: skip


@given(losses=POINTS, front=POINTS)
def test_igd_plus_is_the_mean_distance_missed(losses, front):
    assert igd_plus(losses, front) == pytest.approx(missed(losses, front))


@given(losses=POINTS, front=POINTS, more=POINTS)
def test_igd_plus_is_zero_for_the_front_and_never_grows_with_further_points(losses, front, more):
    assert igd_plus(np.concatenate([front, losses]), front) == 0
    assert igd_plus(np.concatenate([losses, more]), front) <= igd_plus(losses, front)


@given(losses=POINTS)
def test_the_curve_is_the_area_of_the_unit_squares_that_each_beginning_dominates(losses):
    """Points at whole numbers: a square counts if its lower corner is dominated."""
    corners = np.array([(x, y) for x in range(4) for y in range(4)])
    squares = [
        sum(any((row <= corner).all() for row in losses[: n + 1]) for corner in corners)
        for n in range(len(losses))
    ]
    curve = hypervolume_curve(losses, np.array([4.0, 4.0]))
    np.testing.assert_allclose(curve, squares)
    assert curve[-1] == pytest.approx(hypervolume(losses, np.array([4.0, 4.0])))


def test_the_curve_of_three_objectives_agrees_with_moocore():
    import moocore

    losses = np.random.default_rng(0).random((30, 3))
    oracle = [moocore.hypervolume(losses[: n + 1], ref=[0.9, 0.9, 0.9]) for n in range(30)]
    np.testing.assert_allclose(hypervolume_curve(losses, np.full(3, 0.9)), oracle)


@pytest.mark.parametrize("losses", [np.empty((0, 2)), np.zeros((2, 3)), np.zeros(2)])
def test_tables_that_do_not_fit_are_refused(losses):
    with pytest.raises(ValueError, match="igd_plus: losses and front must be tables"):
        igd_plus(losses, np.zeros((1, 2)))
