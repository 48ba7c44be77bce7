import numpy as np

from lightning_nas.objectives import Maximize
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.strategies import Random
from lightning_nas.study import search

SPACE = SearchSpace([Choice(f"c{i}", (0, 1, 2, 3)) for i in range(10)])


def drawn(seed, budget=400):
    result = search(
        SPACE,
        lambda architecture: {"value": 0.0},
        [Maximize("value")],
        strategy=Random(),
        budget=budget,
        seed=seed,
        storage="memory",
        progress=False,
    )
    return np.array([list(c.architecture.values()) for c in result.candidates])


def test_every_pair_of_choices_is_drawn_uniformly():
    rows = drawn(seed=0)
    for i in range(10):
        for j in range(i):
            counts = np.bincount(4 * rows[:, i] + rows[:, j], minlength=16)
            chi_square = ((counts - 25) ** 2 / 25).sum()
            assert chi_square < 50  # 15 degrees of freedom, p = 1e-5; 45 pairs


def test_successive_proposals_and_neighbouring_seeds_are_independent():
    rows, others = drawn(seed=0), drawn(seed=1)
    # 4,000 comparisons that agree with probability 1/4: five standard deviations are 0.034
    assert abs((rows[1:] == rows[:-1]).mean() - 0.25) < 0.035
    assert abs((rows == others).mean() - 0.25) < 0.035
    assert abs((rows[1:] == others[:-1]).mean() - 0.25) < 0.035
