"""The kind of predictor that explains the measured networks best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_nas.predictors._predictor import Prediction, Predictor, predictors
from lightning_nas.predictors.quality import Quality, cross_validated

__all__ = ["Automatic"]


@predictors.register("auto")
class Automatic(Predictor):
    """Chooses among kinds of predictors by cross-validated rank correlation, anew as the rows double.

    The choice is made on the first so many rows, a power of two, and learned from all of them; what was
    chosen for the same rows before is remembered.

    Args:
        among: names of registered predictors; the first one also serves where there are too few rows to tell.
        folds: of the cross-validation, at least 2.

    Attributes:
        chosen: the name of the kind in use.
        qualities: what the cross-validation found, by name; empty where there were fewer than four rows.

    Raises:
        ValueError: for no name, an unknown one, its own, or fewer than two folds.
    """

    def __init__(
        self, among: Sequence[str] = ("ridge", "kernel-ridge", "gbdt", "mlp"), folds: int = 5
    ) -> None:
        super().__init__()
        if not among or "auto" in among or folds < 2:
            raise ValueError(
                "Automatic: among must name predictors other than 'auto', and folds be at least 2, got "
                f"{tuple(among)} and {folds}."
            )
        self._makers = {name: predictors[name] for name in among}
        self.folds = folds
        self.chosen = among[0]
        self.qualities: dict[str, Quality] = {}
        self._best: Predictor | None = None

    @override
    def _fit(self, features: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        self.chosen, self.qualities = next(iter(self._makers)), {}
        if len(targets) >= 4 and len(self._makers) > 1:
            rows = 2 ** (len(targets).bit_length() - 1)
            x, y = self._features[:rows], self._targets[:rows]
            found = (
                _validated(make, self.folds, x.shape, x.tobytes(), y.tobytes())
                for make in self._makers.values()
            )
            self.qualities = dict(zip(self._makers, found, strict=True))
            known = {n: q.kendall for n, q in self.qualities.items() if not math.isnan(q.kendall)}
            self.chosen = max(known, key=lambda name: known[name], default=self.chosen)
        self._best = self._makers[self.chosen]().fit(features, targets)

    @override
    def _predict(self, features: NDArray[np.float64]) -> Prediction:
        assert self._best is not None  # made in _fit
        return self._best.predict(features)


@lru_cache(maxsize=64)  # each population learns from the same first rows, as a search that resumes
def _validated(
    make: type[Predictor], folds: int, shape: tuple[int, ...], features: bytes, targets: bytes
) -> Quality:
    return cross_validated(make, np.frombuffer(features).reshape(shape), np.frombuffer(targets), folds=folds)
