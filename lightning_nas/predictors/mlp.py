"""An ensemble of small networks, which may learn free statistics of architectures first."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self, override

from lightning_nas.predictors._predictor import Prediction, Predictor, predictors

__all__ = ["MLPEnsemble"]


@contextmanager
def _alone() -> Iterator[None]:
    """Whatever modes the caller is in: a search may run between the steps of a training."""
    full = torch.autocast("cpu", enabled=False)
    # The mode for a device looks at every operation, so it is entered only where there is another one.
    here = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with torch.inference_mode(False), torch.enable_grad(), here, full:
        yield


@predictors.register("mlp")
class MLPEnsemble(Predictor):
    """Multi-layer perceptrons with other first weights; how far they disagree is how unsure they are.

    Trained on all rows at once with AdamW and the Huber loss. :meth:`pretrain` lets them first learn what
    costs nothing to know, such as parameters and operations of many architectures.

    Args:
        members: networks, at least 1; with one there is no uncertainty.
        width: of both hidden layers.
        steps: of training.
        lr: learning rate, above 0.
        weight_decay: at least 0.
        frozen: share of these steps after pretraining in which only the new head learns, in [0, 1).
        seed: of their first weights.

    Raises:
        ValueError: for a value out of its range.

    Reference: Dai et al., FBNetV3, CVPR 2021, section 3 (pretraining on architecture statistics).
    """

    def __init__(
        self,
        members: int = 5,
        width: int = 64,
        steps: int = 200,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        frozen: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(members, width, steps) < 1 or not 0 <= frozen < 1:
            raise ValueError(
                "MLPEnsemble: members, width and steps must be at least 1 and frozen in [0, 1), got "
                f"{members}, {width}, {steps} and {frozen}."
            )
        if lr <= 0 or weight_decay < 0:
            raise ValueError(
                f"MLPEnsemble: lr must be above 0 and weight_decay at least 0, got {lr} and {weight_decay}."
            )
        self.members, self.width, self.steps, self.lr = members, width, steps, lr
        self.weight_decay, self.frozen, self.seed = weight_decay, frozen, seed
        self._pretrained: list[_Layer] = []
        self._layers: list[_Layer] = []

    @_alone()
    def pretrain(
        self, features: ArrayLike, statistics: ArrayLike, steps: int = 400, lr: float = 3e-3
    ) -> Self:
        """Learn statistics of architectures, from which every later ``fit`` starts.

        Args:
            features: ``(n, d)`` of architectures that need not be measured.
            statistics: ``(n, k)``, such as the logarithms of parameters and operations.
            steps: of training.
            lr: learning rate.

        Returns:
            The predictor itself.

        Raises:
            ValueError: for shapes that do not fit, or statistics that are not finite.
        """
        x, y = (torch.as_tensor(np.asarray(a, dtype=np.float32)) for a in (features, statistics))
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(
                f"MLPEnsemble.pretrain: features must be (n, d) and statistics (n, k), got {tuple(x.shape)} "
                f"and {tuple(y.shape)}."
            )
        if not torch.isfinite(y).all():
            raise ValueError("MLPEnsemble.pretrain: statistics must be finite.")
        y = (y - y.mean(0)) / y.std(0).clamp_min(1e-12)
        self._pretrained = self._trained(self._new(x.shape[1], y.shape[1]), x, y, steps, lr)
        return self

    @override
    @_alone()
    def _fit(self, features: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        x = torch.as_tensor(features, dtype=torch.float32)
        y = torch.as_tensor(targets, dtype=torch.float32)[:, None]
        layers = self._new(x.shape[1], 1)
        if self._pretrained:
            if (inputs := self._pretrained[0].weight.shape[1]) != x.shape[1]:
                raise ValueError(
                    f"MLPEnsemble: it was pretrained on {inputs} features, and these have {x.shape[1]}."
                )
            layers[:-1] = copy.deepcopy(self._pretrained[:-1])
        frozen = round(self.frozen * self.steps) if self._pretrained else 0
        self._layers = self._trained(layers, x, y, self.steps, self.lr, frozen)

    @override
    @_alone()
    def _predict(self, features: NDArray[np.float64]) -> Prediction:
        with torch.no_grad():
            each = _outputs(self._layers, torch.as_tensor(features, dtype=torch.float32))
        values = each[..., 0].double().numpy()
        return Prediction(values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None)

    def _new(self, inputs: int, outputs: int) -> list[_Layer]:
        generator = torch.Generator().manual_seed(self.seed)
        sizes = (inputs, self.width, self.width, outputs)
        return [_Layer(self.members, i, o, generator) for i, o in pairwise(sizes)]

    def _trained(
        self, layers: list[_Layer], x: Tensor, y: Tensor, steps: int, lr: float, frozen: int = 0
    ) -> list[_Layer]:
        body = [parameter for layer in layers[:-1] for parameter in layer.parameters()]
        optimizer = torch.optim.AdamW(
            [*body, *layers[-1].parameters()], lr, weight_decay=self.weight_decay, fused=True
        )
        target = y.expand(self.members, *y.shape)
        for step in range(steps):
            optimizer.zero_grad()
            # The sum over members: each learns as if it were alone.
            (self.members * F.huber_loss(_outputs(layers, x), target)).backward()
            if step < frozen:
                for parameter in body:
                    parameter.grad = None
            optimizer.step()
        return layers


class _Layer(nn.Module):
    """A linear layer for each member, side by side."""

    def __init__(self, members: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = inputs**-0.5  # as nn.Linear begins
        self.weight, self.bias = (
            nn.Parameter(
                torch.empty(members, rows, outputs, dtype=torch.float32).uniform_(
                    -bound, bound, generator=generator
                )
            )
            for rows in (inputs, 1)
        )

    @override
    def forward(self, x: Tensor) -> Tensor:  # (members, n, inputs)
        return torch.baddbmm(self.bias, x, self.weight)


def _outputs(layers: list[_Layer], x: Tensor) -> Tensor:
    """What each member says, ``(members, n, outputs)``."""
    hidden = x.expand(len(layers[0].weight), *x.shape)
    for layer in layers[:-1]:
        hidden = layer(hidden).relu()
    output: Tensor = layers[-1](hidden)
    return output
