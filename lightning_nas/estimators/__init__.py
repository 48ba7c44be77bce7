"""Gradient estimators: codes of exactly -1 and +1 forward, and a named rule backward; one file a paper."""

from lightning_nas.estimators._estimator import (
    Estimator,
    estimator_named,
    estimators,
    sign,
    straight_through,
    with_slope,
)
from lightning_nas.estimators.biper import BiPer, biper_slope, sine_penalty
from lightning_nas.estimators.bireal import BiReal, bireal_slope, unit_variance
from lightning_nas.estimators.dsq import DSQ, dsq_slope
from lightning_nas.estimators.ede import EDE, ede_slope
from lightning_nas.estimators.elastic import Elastic, elastic_codes, scale_gradient
from lightning_nas.estimators.reste import ReSTE, estimating_error, gradient_stability, reste_slope
from lightning_nas.estimators.ste import STE, Identity, ste_slope

__all__ = [
    "DSQ",
    "EDE",
    "STE",
    "BiPer",
    "BiReal",
    "Elastic",
    "Estimator",
    "Identity",
    "ReSTE",
    "biper_slope",
    "bireal_slope",
    "dsq_slope",
    "ede_slope",
    "elastic_codes",
    "estimating_error",
    "estimator_named",
    "estimators",
    "gradient_stability",
    "reste_slope",
    "scale_gradient",
    "sign",
    "sine_penalty",
    "ste_slope",
    "straight_through",
    "unit_variance",
    "with_slope",
]
