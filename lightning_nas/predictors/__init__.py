"""What an architecture would score, learned from those that were measured; one file each."""

from lightning_nas.predictors._predictor import Prediction, Predictor, predictors
from lightning_nas.predictors.automatic import Automatic
from lightning_nas.predictors.gbdt import GBDT
from lightning_nas.predictors.kernel import SVR, KernelRidge
from lightning_nas.predictors.linear import Ridge
from lightning_nas.predictors.mlp import MLPEnsemble
from lightning_nas.predictors.quality import Quality, cross_validated, quality_of

__all__ = [
    "GBDT",
    "SVR",
    "Automatic",
    "KernelRidge",
    "MLPEnsemble",
    "Prediction",
    "Predictor",
    "Quality",
    "Ridge",
    "cross_validated",
    "predictors",
    "quality_of",
]
