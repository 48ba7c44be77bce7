"""Networks that papers binarize, as float networks: :func:`lightning_nas.binarize` makes them binary.

In all of them what a binary convolution sees has both signs: no convolution but the first follows a ReLU.
"""

from lightning_nas.models.resnet import ResNet, bireal_resnet18, reactnet_resnet18, resnet20
from lightning_nas.models.vgg import VGGSmall, vgg_small

__all__ = ["ResNet", "VGGSmall", "bireal_resnet18", "reactnet_resnet18", "resnet20", "vgg_small"]
