"""Gradient-boosted trees: options that matter only together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import override

from lightning_nas.predictors._predictor import Prediction, Predictor, predictors

__all__ = ["GBDT"]


@predictors.register("gbdt")
class GBDT(Predictor):
    """LightGBM, with the settings of GBDT-NAS; several boosters of other seeds tell how unsure they are.

    Args:
        members: boosters, at least 1; with one there is no uncertainty.
        rounds: trees of each, at least 1.
        leaves: of a tree, at least 2.
        learning_rate: above 0.
        rows_in_leaf: rows that a leaf holds at least, at least 1; None: a fiftieth of all, within 2 and 10.
        seed: of the first booster.

    Raises:
        ValueError: for a value out of its range.

    Reference: Luo et al., Accuracy Prediction with Non-neural Model for NAS, 2020: 100 rounds, 31 leaves,
    rate 0.05, 90 % of the features a tree and 80 % of the rows every fifth.
    """

    def __init__(
        self,
        members: int = 3,
        rounds: int = 100,
        leaves: int = 31,
        learning_rate: float = 0.05,
        rows_in_leaf: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(members, rounds, 1 if rows_in_leaf is None else rows_in_leaf) < 1 or leaves < 2:
            raise ValueError(
                "GBDT: members, rounds and rows_in_leaf must be at least 1 and leaves at least 2, got "
                f"{members}, {rounds}, {rows_in_leaf} and {leaves}."
            )
        if learning_rate <= 0:
            raise ValueError(f"GBDT: learning_rate must be above 0, got {learning_rate}.")
        self.members, self.rounds, self.leaves = members, rounds, leaves
        self.learning_rate, self.rows_in_leaf, self.seed = learning_rate, rows_in_leaf, seed
        self._boosters: list[Any] = []

    @override
    def _fit(self, features: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        import lightgbm

        rows_in_leaf = self.rows_in_leaf or min(10, max(2, len(targets) // 50))
        settings = {
            "objective": "regression", "num_leaves": self.leaves, "learning_rate": self.learning_rate,
            "feature_fraction": 0.9, "bagging_fraction": 0.8, "bagging_freq": 5,
            "min_data_in_leaf": rows_in_leaf, "min_data_in_bin": 1, "verbosity": -1, "num_threads": 1,
            "deterministic": True, "force_row_wise": True,
        }  # fmt: skip
        self._boosters = [
            lightgbm.train(
                {**settings, "seed": self.seed + member},
                lightgbm.Dataset(features, targets, params={"verbosity": -1}),
                self.rounds,
            )
            for member in range(self.members)
        ]

    @override
    def _predict(self, features: NDArray[np.float64]) -> Prediction:
        each = np.array([booster.predict(features, num_threads=1) for booster in self._boosters])
        return Prediction(each.mean(0), each.std(0, ddof=1) if len(each) > 1 else None)

    def contributions(self, features: ArrayLike) -> NDArray[np.float64]:
        """How much each feature moves each prediction away from the mean of all: exact SHAP values.

        Args:
            features: ``(n, d)``.

        Returns:
            ``(n, d + 1)`` in the unit of the targets, the base value last; a row sums to the prediction.

        Raises:
            ValueError: before ``fit``, or for another number of features.

        Reference: Lundberg et al., Nature Machine Intelligence 2020 (TreeExplainer).
        """
        self.predict(np.asarray(features)[:0])  # for its checks
        x = np.asarray(features, dtype=np.float64)
        each = [booster.predict(x, pred_contrib=True, num_threads=1) for booster in self._boosters]
        values: NDArray[np.float64] = np.mean(each, axis=0) * self._scale
        values[:, -1] += self._centre
        return values
