import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_nas.objectives import Maximize, Minimize
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.strategies import Evolution
from lightning_nas.strategies.evolution import crowding_distances, mutated, ranks
from lightning_nas.study import search

SPACE = SearchSpace([Choice(f"c{i}", tuple(range(6))) for i in range(8)])


def rugged(architecture):
    values = np.array(list(architecture.values()))
    return {
        "gain": float(np.sin(3.7 * values).sum() - abs(np.diff(values)).sum() / 9),
        "price": float(values.sum()),
    }


GAIN = (Maximize("gain"),)


def found(strategy, objectives=GAIN, **settings):
    settings = {"budget": 120, "storage": "memory", "progress": False, **settings}
    return search(SPACE, rugged, objectives, strategy=strategy, **settings).candidates


def steps(one, other):
    return sum(a != b for a, b in zip(one.architecture.values(), other.architecture.values(), strict=True))


def test_with_a_tournament_of_all_each_child_is_one_step_from_the_best_of_the_last_measured():
    candidates = found(Evolution(population=8, tournament=8))
    overtaken = 0
    for i in range(8, len(candidates)):
        living = candidates[i - 8 : i]
        parent = max(living, key=lambda c: c.values["gain"])
        assert steps(parent, candidates[i]) == 1
        overtaken += parent is not max(candidates[:i], key=lambda c: c.values["gain"])
    assert overtaken > 20  # the best ever had died of age, so the best living was another


def test_parents_win_tournaments_and_the_first_population_is_random():
    candidates = found(Evolution(population=20, tournament=5))
    assert min(steps(a, b) for i, a in enumerate(candidates[:20]) for b in candidates[:i]) > 1
    for i in range(20, len(candidates)):
        living = sorted(candidates[i - 20 : i], key=lambda c: -c.values["gain"])
        assert min(living.index(p) for p in living if steps(p, candidates[i]) == 1) <= 15  # four are beaten


def test_of_several_objectives_the_parent_is_on_the_front_of_the_living():
    candidates = found(Evolution(population=12, tournament=12), (Maximize("gain"), Minimize("price")))
    for i in range(12, len(candidates)):
        points = [(-c.values["gain"], c.values["price"]) for c in candidates[i - 12 : i]]
        front = [
            c
            for c, p in zip(candidates[i - 12 : i], points, strict=True)
            if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
        ]
        assert any(steps(c, candidates[i]) == 1 for c in front)


def test_what_breaks_a_measured_constraint_loses_to_what_breaks_it_less():
    candidates = found(Evolution(population=8, tournament=8), constraints={"price": ("<=", 12)}, budget=60)
    for i in range(8, len(candidates)):

        def rank(c):
            return max(0.0, c.values["price"] - 12), -c.values["gain"]

        assert steps(min(candidates[i - 8 : i], key=rank), candidates[i]) == 1
    assert sum(c.values["price"] <= 12 for c in candidates[30:]) > 15  # at random 8 of 100 are


def test_a_mutation_reaches_every_other_value_of_every_active_choice_and_nothing_else():
    space = SearchSpace(
        [
            Choice("a", (1, 2, 3)),
            Choice("b", (1, 2), when={"a": (3,)}),
            Choice("c", (1, 2, 3)),
            Choice("d", (7,)),
        ]
    )
    rng = np.random.default_rng(0)
    start = space.architecture({"a": 1, "b": 2, "c": 1, "d": 7})
    reached = {tuple(mutated(space, start, rng).values()) for _ in range(200)}
    assert reached == {(2, 2, 1, 7), (3, 2, 1, 7), (1, 2, 2, 7), (1, 2, 3, 7)}


POINTS = arrays(
    np.float64, st.tuples(st.integers(1, 9), st.integers(1, 3)), elements=st.integers(0, 3).map(float)
)


@given(losses=POINTS)
def test_a_rank_is_the_longest_chain_of_rows_that_dominate_each_other(losses):
    def chain(row):
        above = [r for r in losses if (r <= row).all() and (r < row).any()]
        return 1 + max(map(chain, above)) if above else 0

    assert ranks(losses).tolist() == list(map(chain, losses))


def test_crowding_distances_are_those_of_a_front_by_hand():
    losses = np.array([[0.0, 10.0], [1.0, 6.0], [4.0, 5.0], [8.0, 0.0]])
    # (4 - 0) / 8 + (10 - 5) / 10 and (8 - 1) / 8 + (6 - 0) / 10
    assert crowding_distances(losses).tolist() == [np.inf, 1.0, 1.475, np.inf]
    assert crowding_distances(np.ones((3, 2))).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 1}, "population must be at least 2, got 1"),
        ({"tournament": 0}, "tournament must be at least 1"),
        ({"population": 5, "tournament": 6}, r"at most the population \(5\), got 6"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Evolution(**settings)
