"""The kind of predictor that explains the measured networks best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_nas.predictors._predictor import Prediction, Predictor, predictors
from lightning_nas.predictors.quality import Quality, cross_validated

__all__ = ["Automatic"]


@predictors.register("auto")
class Automatic(Predictor):
    """Chooses among kinds of predictors by cross-validated rank correlation, anew at each fit.

    Args:
        among: names of registered predictors; the first one also serves where there are too few rows to tell.
        folds: of the cross-validation, at least 2.

    Attributes:
        chosen: the name of the kind in use.
        qualities: what the cross-validation found, by name; empty where there were fewer than four rows.

    Raises:
        ValueError: for no name, an unknown one, its own, or fewer than two folds.
    """

    def __init__(self, among: Sequence[str] = ("ridge", "gbdt", "mlp"), folds: int = 5) -> None:
        super().__init__()
        if not among or "auto" in among or folds < 2:
            raise ValueError(
                "Automatic: among must name predictors other than 'auto', and folds be at least 2, got "
                f"{tuple(among)} and {folds}."
            )
        self._makers = {name: partial(predictors[name]) for name in among}
        self.folds = folds
        self.chosen = among[0]
        self.qualities: dict[str, Quality] = {}
        self._best: Predictor | None = None

    @override
    def _fit(self, features: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        self.chosen, self.qualities = next(iter(self._makers)), {}
        if len(targets) >= 4 and len(self._makers) > 1:
            self.qualities = {
                name: cross_validated(make, features, targets, folds=self.folds)
                for name, make in self._makers.items()
            }
            known = {n: q.kendall for n, q in self.qualities.items() if not math.isnan(q.kendall)}
            self.chosen = max(known, key=lambda name: known[name], default=self.chosen)
        self._best = self._makers[self.chosen]().fit(features, targets)

    @override
    def _predict(self, features: NDArray[np.float64]) -> Prediction:
        assert self._best is not None  # made in _fit
        return self._best.predict(features)
