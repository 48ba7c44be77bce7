"""Ridge regression: what each option adds, on its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_nas.predictors._predictor import Prediction, Predictor, predictors

__all__ = ["Ridge"]


@predictors.register("ridge")
class Ridge(Predictor):
    """Linear regression with a penalty on squared weights, chosen by its exact leave-one-out error.

    One decomposition serves all penalties. Its uncertainty is that of Bayesian linear regression with the
    same penalty: noise, and what the rows left open.

    Args:
        alphas: penalties to choose from, each above 0.

    Raises:
        ValueError: for none, or one that is not above 0.

    Example:
        >>> Ridge().fit([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0]).predict([[3.0]]).mean.round(2)
        array([7.])
    """

    def __init__(self, alphas: Sequence[float] = (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)) -> None:
        super().__init__()
        if not alphas or min(alphas) <= 0:
            raise ValueError(f"Ridge: alphas must be above 0, at least one, got {tuple(alphas)}.")
        self.alphas = tuple(alphas)
        self.alpha = self.alphas[0]

    @override
    def _fit(self, features: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        self._mean = features.mean(0)
        left, values, right = np.linalg.svd(features - self._mean, full_matrices=False)
        coefficients, count = left.T @ targets, len(targets)
        errors = []
        for alpha in self.alphas:
            shrunk = values**2 / (values**2 + alpha)
            leverage = (left**2) @ shrunk + 1 / count  # the mean is fitted too
            residuals = targets - left @ (shrunk * coefficients)
            errors.append(np.mean((residuals / np.maximum(1 - leverage, 1e-9)) ** 2))
        best = int(np.argmin(errors))
        self.alpha, self._noise = self.alphas[best], float(np.sqrt(errors[best]))
        self._weights = right.T @ (values / (values**2 + self.alpha) * coefficients)
        self._right, self._values, self._count = right, values, count

    @override
    def _predict(self, features: NDArray[np.float64]) -> Prediction:
        centred = features - self._mean
        along = centred @ self._right.T
        known = (along**2) @ (1 / (self._values**2 + self.alpha))
        beyond = np.maximum((centred**2).sum(1) - (along**2).sum(1), 0) / self.alpha
        std = self._noise * np.sqrt(1 + 1 / self._count + known + beyond)
        return Prediction(centred @ self._weights, std)
