"""What every predictor offers, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

from lightning_nas.registry import Registry

__all__ = ["Prediction", "Predictor", "predictors"]


class Prediction(NamedTuple):
    """What a predictor says about n architectures.

    Attributes:
        mean: ``(n,)``, in the unit of the targets.
        std: ``(n,)``, how unsure it is of each, in the same unit; None where it cannot tell.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64] | None


class Predictor(ABC):
    """Learns one number from features of architectures, such as ``space.encode(architectures)``.

    A predictor keeps the rows it was fitted on: :meth:`update` adds to them. Targets are standardised inside,
    so their unit does not matter. Subclasses define ``_fit`` and ``_predict`` for standardised targets.
    """

    def __init__(self) -> None:
        self._features = np.empty((0, 0))
        self._targets = np.empty(0)
        self._centre, self._scale = 0.0, 1.0

    def fit(self, features: ArrayLike, targets: ArrayLike) -> Self:
        """Learn from these rows alone.

        Args:
            features: ``(n, d)``.
            targets: ``(n,)``, finite.

        Returns:
            The predictor itself.

        Raises:
            ValueError: for shapes that do not fit, fewer than two rows, or a target that is not finite.
        """
        x, y = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
        name = type(self).__name__
        if x.ndim != 2 or y.shape != (len(x),):
            raise ValueError(
                f"{name}: features must be (n, d) and targets (n,), got {x.shape} and {y.shape}."
            )
        if len(x) < 2:
            raise ValueError(f"{name}: at least two rows are needed to learn from, got {len(x)}.")
        if not np.isfinite(y).all():
            raise ValueError(
                f"{name}: {np.sum(~np.isfinite(y))} of {len(y)} targets are not finite; leave them out."
            )
        self._features, self._targets = x, y
        self._centre, self._scale = float(y.mean()), float(y.std()) or 1.0
        self._fit(x, (y - self._centre) / self._scale)
        return self

    def update(self, features: ArrayLike, targets: ArrayLike) -> Self:
        """Learn from further rows beside those it has.

        Raises:
            ValueError: as :meth:`fit`, or for another number of features.
        """
        x, y = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
        if not len(self._targets):
            return self.fit(x, y)
        self._refuse_other(x)
        return self.fit(np.concatenate([self._features, x]), np.concatenate([self._targets, y]))

    def predict(self, features: ArrayLike) -> Prediction:
        """What these architectures would score.

        Args:
            features: ``(n, d)``.

        Raises:
            ValueError: before :meth:`fit`, or for another number of features.
        """
        x = np.asarray(features, dtype=np.float64)
        if not len(self._targets):
            raise ValueError(f"{type(self).__name__}: call fit(features, targets) first.")
        self._refuse_other(x)
        mean, std = self._predict(x)
        return Prediction(self._centre + self._scale * mean, None if std is None else self._scale * std)

    def _refuse_other(self, features: NDArray[np.float64]) -> None:
        known = self._features.shape[1]
        if features.ndim != 2 or features.shape[1] != known:
            raise ValueError(
                f"{type(self).__name__}: it was fitted on {known} features, got {features.shape}."
            )

    @abstractmethod
    def _fit(self, features: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        """Learn standardised targets."""

    @abstractmethod
    def _predict(self, features: NDArray[np.float64]) -> Prediction:
        """Predict standardised targets."""


predictors: Registry[type[Predictor]] = Registry("predictor")
"""The predictors known by name; users add their own with ``@predictors.register("name")``."""
