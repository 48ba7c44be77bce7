"""Lightning callbacks, one a file; imported as ``lightning_nas.callbacks``."""

from lightning_nas.callbacks.binarization import Binarization
from lightning_nas.callbacks.few_shot import Subspaces, train_subspaces
from lightning_nas.callbacks.instatune import InstaTune
from lightning_nas.callbacks.self_distillation import SelfDistillation
from lightning_nas.callbacks.specialize import specialize
from lightning_nas.callbacks.supernet_training import SupernetTraining

__all__ = [
    "Binarization",
    "InstaTune",
    "SelfDistillation",
    "Subspaces",
    "SupernetTraining",
    "specialize",
    "train_subspaces",
]
