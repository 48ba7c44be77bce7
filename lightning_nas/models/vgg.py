"""VGG-small, the plain convolutional network of the CIFAR experiments."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

__all__ = ["VGGSmall", "vgg_small"]


class VGGSmall(nn.Module):
    """Six convolutions, each with batch norm and hardtanh, the second of each pair with max pooling first.

    Args:
        num_classes: outputs.
        in_chans: channels of images.
        image_size: height and width, at least 8; the head sees an eighth of it.
        widths: channels of the three pairs.

    Shapes: ``(batch, in_chans, image_size, image_size)`` to ``(batch, num_classes)``.

    Raises:
        ValueError: for smaller images.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        image_size: int = 32,
        widths: tuple[int, int, int] = (128, 256, 512),
    ) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError(f"VGGSmall: image_size must be at least 8, got {image_size}.")
        self.arguments = {
            "num_classes": num_classes, "in_chans": in_chans, "image_size": image_size, "widths": [*widths]
        }  # fmt: skip
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        channels = in_chans
        for width in widths:
            for pool in (nn.Identity(), nn.MaxPool2d(2)):
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                layers += [conv, pool, nn.BatchNorm2d(width), nn.Hardtanh()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels * (image_size // 8) ** 2, num_classes)

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits


def vgg_small(num_classes: int = 10, in_chans: int = 3, image_size: int = 32) -> VGGSmall:
    """VGG-small as IR-Net trains it: 4.66 million parameters for ten classes of CIFAR.

    Args:
        num_classes: outputs.
        in_chans: channels of images.
        image_size: height and width.

    Example:
        >>> sum(parameter.numel() for parameter in vgg_small().parameters())
        4660106

    Reference: Qin et al., IR-Net, CVPR 2020, section 4.
    """
    return VGGSmall(num_classes, in_chans, image_size)
