import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_nas.evaluation import difference_of_means
from lightning_nas.objectives import Maximize
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.strategies.grid import grid_point
from lightning_nas.study import search


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_every_point_comes_once_and_every_block_is_balanced(sizes, seed):
    space = SearchSpace([Choice(f"c{i}", tuple(range(size))) for i, size in enumerate(sizes)])
    rows = np.array([list(grid_point(space, seed, i).values()) for i in range(math.prod(sizes))])
    assert len(np.unique(rows, axis=0)) == math.prod(sizes)
    for block in rows.reshape(-1, max(sizes), len(sizes)):
        for column, size in zip(block.T, sizes, strict=True):
            counts = np.bincount(column, minlength=size)
            assert counts.max() - counts.min() <= 1


def test_seeds_give_orders_of_their_own_and_blocks_permutations_of_their_own():
    space = SearchSpace([Choice(f"c{i}", tuple(range(8))) for i in range(4)])
    rows = np.array([[list(grid_point(space, s, i).values()) for i in range(64)] for s in range(2)])
    # 256 comparisons that agree with probability 1/8: five standard deviations are 26
    assert abs((rows[0] == rows[1]).sum() - 32) < 26
    blocks = rows[0].reshape(8, 8, 4)[..., 1]
    assert len(np.unique(blocks, axis=0)) == 8


def test_grid_finds_the_one_option_that_matters_in_one_block_and_random_search_does_not():
    space = SearchSpace([Choice(f"c{i}", tuple(range(16))) for i in range(6)])

    def found(strategy, seed):
        result = search(
            space, lambda a: {"hit": float(a["c3"] == 11)}, [Maximize("hit")], strategy=strategy, budget=16,
            seed=seed, storage="memory", progress=False,
        )  # fmt: skip
        return max(c.values["hit"] for c in result.candidates)

    on_grid, drawn = ([found(strategy, seed) for seed in range(20)] for strategy in ("grid", "random"))
    assert on_grid == [1.0] * 20
    assert difference_of_means(on_grid, drawn).low > 0  # random search: 1 - (15/16)^16 = 0.64
