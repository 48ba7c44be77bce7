"""Families of smaller networks out of one fine-tuning run."""

from lightning_nas import binary, costs, estimators, evaluation, models, predictors, strategies, supernet
from lightning_nas.binary import binarize
from lightning_nas.distillation import Both, HiddenStates, InstaTuneLoss, Relations, Task, Teacher
from lightning_nas.errors import (
    NASError,
    NoMatchError,
    SavedFolderError,
    StorageError,
    StudyMismatchError,
    UnsupportedError,
)
from lightning_nas.evaluation.comparison import Comparison, compare
from lightning_nas.objectives import Maximize, Minimize
from lightning_nas.racing import Race, Racing
from lightning_nas.results import Candidate, SearchResult
from lightning_nas.sampling import Largest, MultiArchitectural, Progressive, Random, Sandwich
from lightning_nas.saving import load, save
from lightning_nas.scalarizations import AbsoluteReward, Chebyshev, HingeReward, MnasNetReward
from lightning_nas.sharing import Sharing
from lightning_nas.space import Architecture, Choice, Depth, SearchSpace
from lightning_nas.study import join, search
from lightning_nas.supernet import Supernet, SupernetEvaluator, elastic

__all__ = [
    "AbsoluteReward",
    "Architecture",
    "Both",
    "Candidate",
    "Chebyshev",
    "Choice",
    "Comparison",
    "Depth",
    "HiddenStates",
    "HingeReward",
    "InstaTuneLoss",
    "Largest",
    "Maximize",
    "Minimize",
    "MnasNetReward",
    "MultiArchitectural",
    "NASError",
    "NoMatchError",
    "Progressive",
    "Race",
    "Racing",
    "Random",
    "Relations",
    "Sandwich",
    "SavedFolderError",
    "SearchResult",
    "SearchSpace",
    "Sharing",
    "StorageError",
    "StudyMismatchError",
    "Supernet",
    "SupernetEvaluator",
    "Task",
    "Teacher",
    "UnsupportedError",
    "binarize",
    "binary",
    "compare",
    "costs",
    "elastic",
    "estimators",
    "evaluation",
    "join",
    "load",
    "models",
    "predictors",
    "save",
    "search",
    "strategies",
    "supernet",
]
