"""Regression by similarity to the networks that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_nas.predictors._predictor import Prediction, Predictor, predictors

__all__ = ["SVR", "KernelRidge"]


@predictors.register("kernel-ridge")
class KernelRidge(Predictor):
    """Ridge regression with a Gaussian kernel, its width and penalty chosen by the exact leave-one-out error.

    It is the mean of a Gaussian process, and its uncertainty that of the process.

    Args:
        widths: of the kernel, in units of the mean distance of two rows; each above 0.
        alphas: penalties to choose from, each above 0.

    Raises:
        ValueError: for none, or one that is not above 0.

    Reference: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, sections 2.2 and 5.4.2.
    """

    def __init__(
        self,
        widths: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0),
        alphas: Sequence[float] = (1e-4, 1e-3, 1e-2, 0.1, 1.0),
    ) -> None:
        super().__init__()
        for name, values in (("widths", widths), ("alphas", alphas)):
            if not values or min(values) <= 0:
                raise ValueError(f"KernelRidge: {name} must be above 0, at least one, got {tuple(values)}.")
        self.widths, self.alphas = tuple(widths), tuple(alphas)
        self.width, self.alpha = self.widths[0], self.alphas[0]

    @override
    def _fit(self, features: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        self._rows = features
        squared = _squared_distances(features, features)
        self._unit = float(squared.sum() / max(1, len(squared) * (len(squared) - 1))) or 1.0
        best = np.inf
        for width in self.widths:
            values, vectors = np.linalg.eigh(self._kernel(squared, width))
            values, turned = np.maximum(values, 0), vectors.T @ targets
            for alpha in self.alphas:
                inverse = (vectors**2) @ (1 / (values + alpha))  # the diagonal of (K + alpha I)^-1
                dual = vectors @ (turned / (values + alpha))
                error = float(np.mean((dual / inverse) ** 2))
                if error < best:
                    best, self.width, self.alpha, self._dual = error, width, alpha, dual
                    self._values, self._vectors = values, vectors
        signal = float(np.mean(targets * self._dual))  # maximum likelihood of the process's variance
        self._signal = max(signal, 1e-12)

    @override
    def _predict(self, features: NDArray[np.float64]) -> Prediction:
        kernel = self._kernel(_squared_distances(features, self._rows), self.width)
        along = kernel @ self._vectors
        left = 1 + self.alpha - (along**2) @ (1 / (self._values + self.alpha))
        return Prediction(kernel @ self._dual, np.sqrt(self._signal * np.maximum(left, 1e-12)))

    def _kernel(self, squared: NDArray[np.float64], width: float) -> NDArray[np.float64]:
        kernel: NDArray[np.float64] = np.exp(-squared / (2 * width**2 * self._unit))
        return kernel


@predictors.register("svr")
class SVR(Predictor):
    """scikit-learn's support vector regression, Gaussian kernel, its penalty chosen by cross-validation.

    It cannot tell how unsure it is.

    Args:
        penalties: values of C to choose from, each above 0.
        epsilon: errors below it cost nothing, in standard deviations of the targets, at least 0.
        folds: of the cross-validation, at least 2.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(
        self, penalties: Sequence[float] = (0.3, 1.0, 3.0, 10.0, 30.0), epsilon: float = 0.05, folds: int = 5
    ) -> None:
        super().__init__()
        if not penalties or min(penalties) <= 0 or epsilon < 0 or folds < 2:
            raise ValueError(
                f"SVR: penalties must be above 0, epsilon at least 0 and folds at least 2, got "
                f"{tuple(penalties)}, {epsilon} and {folds}."
            )
        self.penalties, self.epsilon, self.folds = tuple(penalties), epsilon, folds
        self._model: Any = None

    @override
    def _fit(self, features: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        from sklearn.model_selection import GridSearchCV, KFold
        from sklearn.svm import SVR as Machine

        model = Machine(epsilon=self.epsilon, gamma="scale")
        folds = KFold(min(self.folds, len(targets)), shuffle=True, random_state=0)
        search = GridSearchCV(model, {"C": list(self.penalties)}, cv=folds, scoring="neg_mean_squared_error")
        self._model = search.fit(features, targets).best_estimator_

    @override
    def _predict(self, features: NDArray[np.float64]) -> Prediction:
        return Prediction(np.asarray(self._model.predict(features), dtype=np.float64), None)


def _squared_distances(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    squared = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
    distances: NDArray[np.float64] = np.maximum(squared, 0)
    return distances
