"""How to choose the next architectures to evaluate, one file each; all are Optuna samplers underneath."""

from lightning_nas.strategies._strategy import PREDICTED, SHARE, Strategy, note, seeds, strategies
from lightning_nas.strategies.coarse_to_fine import CoarseToFine
from lightning_nas.strategies.evolution import Evolution
from lightning_nas.strategies.gbdt import GBDTNAS
from lightning_nas.strategies.grid import Grid
from lightning_nas.strategies.linas import LINAS
from lightning_nas.strategies.nsga2 import NSGA2
from lightning_nas.strategies.nsga3 import NSGA3
from lightning_nas.strategies.random import Random
from lightning_nas.strategies.successive_halving import SuccessiveHalving
from lightning_nas.strategies.tpe import TPE

__all__ = [
    "GBDTNAS",
    "LINAS",
    "NSGA2",
    "NSGA3",
    "PREDICTED",
    "SHARE",
    "TPE",
    "CoarseToFine",
    "Evolution",
    "Grid",
    "Random",
    "Strategy",
    "SuccessiveHalving",
    "note",
    "seeds",
    "strategies",
]
