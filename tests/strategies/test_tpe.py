import pytest

from lightning_nas.objectives import Maximize
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.strategies import TPE
from lightning_nas.study import search

SPACE = SearchSpace([Choice(f"c{i}", tuple("abcdefgh")) for i in range(6)])
IDEAL = "hbdaec"


def found(strategy, seed, budget=90):
    result = search(
        SPACE, lambda a: {"agree": float(sum(map(str.__eq__, a.values(), IDEAL)))}, [Maximize("agree")],
        strategy=strategy, budget=budget, seed=seed, storage="memory", progress=False,
    )  # fmt: skip
    return result.candidates


@pytest.mark.parametrize("seed", range(2))
def test_tpe_nears_an_ideal_of_choices_without_an_order(seed):
    assert max(c.values["agree"] for c in found("tpe", seed)) >= 5  # 43 of 262,144: random search has 1.5 %
    assert max(c.values["agree"] for c in found("random", seed)) <= 4


def test_the_first_candidates_are_those_of_random_search():
    startup = [c.architecture for c in found(TPE(startup=15), seed=4, budget=16)]
    drawn = [c.architecture for c in found("random", seed=4, budget=16)]
    assert startup[:15] == drawn[:15]
    assert startup[15] != drawn[15]


@pytest.mark.parametrize("setting", ["startup", "draws"])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=f"TPE: {setting} must be at least 1, got 0"):
        TPE(**{setting: 0})
