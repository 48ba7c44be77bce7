"""How to choose the next architectures to evaluate, one file each; all are Optuna samplers underneath."""

from lightning_nas.strategies._strategy import Strategy, seeds, strategies
from lightning_nas.strategies.coarse_to_fine import CoarseToFine
from lightning_nas.strategies.linas import LINAS
from lightning_nas.strategies.nsga2 import NSGA2
from lightning_nas.strategies.random import Random

__all__ = ["LINAS", "NSGA2", "CoarseToFine", "Random", "Strategy", "seeds", "strategies"]
