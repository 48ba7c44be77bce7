"""Families of smaller networks out of one fine-tuning run."""

from lightning_nas import binary, costs, estimators, evaluation, models, predictors, strategies, supernet
from lightning_nas.binary import binarize
from lightning_nas.distillation import Both, HiddenStates, InstaTuneLoss, Relations, Task, Teacher
from lightning_nas.errors import (
    NASError,
    NoMatchError,
    SavedFolderError,
    StudyMismatchError,
    UnsupportedError,
)
from lightning_nas.evaluation.comparison import Comparison, compare
from lightning_nas.objectives import Maximize, Minimize
from lightning_nas.results import Candidate, SearchResult
from lightning_nas.sampling import Largest, MultiArchitectural, Progressive, Random, Sandwich
from lightning_nas.saving import load, save
from lightning_nas.scalarizations import AbsoluteReward, Chebyshev, HingeReward, MnasNetReward
from lightning_nas.space import Architecture, Choice, Depth, SearchSpace
from lightning_nas.study import search
from lightning_nas.supernet import Supernet, elastic

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
    "Random",
    "Relations",
    "Sandwich",
    "SavedFolderError",
    "SearchResult",
    "SearchSpace",
    "StudyMismatchError",
    "Supernet",
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
    "load",
    "models",
    "predictors",
    "save",
    "search",
    "strategies",
    "supernet",
]
