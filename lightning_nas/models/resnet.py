"""Residual networks of the binary papers: one class, whose arguments are where they differ."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_nas.binary.activations import RPReLU
from lightning_nas.registry import nearest

__all__ = ["ResNet", "bireal_resnet18", "reactnet_resnet18", "resnet20"]

Order = Literal["relu-norm", "norm-hardtanh", "bireal", "reactnet"]
Shortcut = Literal["block", "convolution"]
Downsample = Literal["pad", "convolution"]
Stem = Literal["small", "large"]


class ResNet(nn.Module):
    """A residual network of blocks of two 3 x 3 convolutions, which become binary, in one of four orders.

    =====================  =====================================  =====================
    ``order``              a branch                               behind the addition
    =====================  =====================================  =====================
    ``"relu-norm"``        convolution, ReLU, batch norm          nothing
    ``"norm-hardtanh"``    convolution, batch norm                hardtanh
    ``"bireal"``           hardtanh, convolution, batch norm      nothing
    ``"reactnet"``         convolution, batch norm                RPReLU
    =====================  =====================================  =====================

    The hardtanh of ``"bireal"`` does not change a sign: it keeps the float network from being linear.

    Args:
        blocks: how many in each stage; all stages but the first begin with stride 2.
        widths: channels of each stage.
        num_classes: outputs.
        in_chans: channels of images.
        order: of the layers; see the table.
        shortcut: around each ``"block"``, or around each ``"convolution"``, as Bi-Real has it.
        downsample: shortcuts between stages: ``"pad"``, every second pixel and new channels of 0, option A of
            He et al.; or ``"convolution"``, 2 x 2 average pooling, a 1 x 1 convolution that stays real, and
            batch norm.
        stem: ``"small"``, a 3 x 3 convolution, for images of 32 pixels and less; ``"large"``, 7 x 7 with
            stride 2, and max pooling with stride 2.

    Shapes: ``(batch, in_chans, height, width)`` to ``(batch, num_classes)``.

    Raises:
        ValueError: for an unknown option, or stages that differ in number.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        order: Order = "relu-norm",
        shortcut: Shortcut = "block",
        downsample: Downsample = "pad",
        stem: Stem = "small",
    ) -> None:
        super().__init__()
        options = {"order": order, "shortcut": shortcut, "downsample": downsample, "stem": stem}
        known = {"order": Order, "shortcut": Shortcut, "downsample": Downsample, "stem": Stem}
        for name, value in options.items():
            if value not in get_args(known[name]):
                raise ValueError(f"ResNet: unknown {name} {value!r}. {nearest(value, get_args(known[name]))}")
        if len(blocks) != len(widths) or not blocks:
            raise ValueError(f"ResNet: blocks and widths must be equally many, got {blocks=} and {widths=}.")
        self.arguments = {
            "blocks": [*blocks], "widths": [*widths], "num_classes": num_classes, "in_chans": in_chans,
            **options,
        }  # fmt: skip
        self.num_classes = num_classes
        self.stem = _stem(in_chans, widths[0], order, stem)
        stages, channels = [], widths[0]
        for stage, (number, width) in enumerate(zip(blocks, widths, strict=True)):
            strides = [2 if stage and not block else 1 for block in range(number)]
            stages.append(
                nn.Sequential(
                    *(
                        Block(channels if not block else width, width, stride, order, shortcut, downsample)
                        for block, stride in enumerate(strides)
                    )
                )
            )
            channels = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    @override
    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.stages(self.stem(images))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class Block(nn.Module):
    """Two branches with a shortcut around both, or around each; arguments as in :class:`ResNet`."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        order: Order,
        shortcut: Shortcut,
        downsample: Downsample,
    ) -> None:
        super().__init__()
        self.is_around_each = shortcut == "convolution"
        self.branch1 = _branch(in_channels, channels, stride, order)
        self.act1 = _after(channels, order)
        self.branch2 = _branch(channels, channels, 1, order)
        self.act2 = _after(channels, order)
        self.downsample = (
            nn.Identity()
            if stride == 1 and in_channels == channels
            else PaddedShortcut(channels - in_channels, stride)
            if downsample == "pad"
            else nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(in_channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
            )
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        passed = self.downsample(x)
        inner = self.branch1(x)
        inner = self.act1(inner + passed if self.is_around_each else inner)
        out: Tensor = self.act2(self.branch2(inner) + (inner if self.is_around_each else passed))
        return out


class PaddedShortcut(nn.Module):
    """Every ``stride``-th pixel; new channels of 0, half before and half behind: option A of He et al."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = more, stride

    @override
    def forward(self, x: Tensor) -> Tensor:
        before = self.more // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.more - before))

    @override
    def extra_repr(self) -> str:
        return f"more={self.more}, stride={self.stride}"


def _branch(in_channels: int, channels: int, stride: int, order: Order) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    norm = nn.BatchNorm2d(channels)
    layers: dict[Order, OrderedDict[str, nn.Module]] = {
        "relu-norm": OrderedDict(conv=conv, act=nn.ReLU(), norm=norm),
        "norm-hardtanh": OrderedDict(conv=conv, norm=norm),
        "bireal": OrderedDict(act=nn.Hardtanh(), conv=conv, norm=norm),
        "reactnet": OrderedDict(conv=conv, norm=norm),
    }
    return nn.Sequential(layers[order])


def _after(channels: int, order: Order) -> nn.Module:
    if order == "reactnet":
        return RPReLU(channels)
    return nn.Hardtanh() if order == "norm-hardtanh" else nn.Identity()


def _stem(in_chans: int, channels: int, order: Order, stem: Stem) -> nn.Sequential:
    if stem == "large":
        return nn.Sequential(
            nn.Conv2d(in_chans, channels, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(channels),
            nn.MaxPool2d(3, 2, padding=1),
        )
    layers: list[nn.Module] = [nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)]
    layers += [nn.ReLU()] if order == "relu-norm" else []
    return nn.Sequential(*layers, nn.BatchNorm2d(channels))


def resnet20(
    num_classes: int = 10,
    in_chans: int = 3,
    shortcut: Shortcut = "block",
    order: Order = "relu-norm",
) -> ResNet:
    """The ResNet-20 of the CIFAR experiments, 0.27 million parameters, with shortcuts of option A.

    Args:
        num_classes: outputs.
        in_chans: channels of images.
        shortcut: around each ``"block"``, or each ``"convolution"``, which ReSTE's table calls Bi-Real.
        order: ``"relu-norm"`` is ReSTE's, ``"norm-hardtanh"`` IR-Net's; see :class:`ResNet`.

    Example:
        >>> sum(parameter.numel() for parameter in resnet20().parameters())
        269722

    Reference: Wu et al., ICCV 2023 (ReSTE); Qin et al., CVPR 2020 (IR-Net).
    """
    return ResNet((3, 3, 3), (16, 32, 64), num_classes, in_chans, order, shortcut)


def bireal_resnet18(
    num_classes: int = 1000,
    in_chans: int = 3,
    stem: Stem = "large",
    downsample: Downsample = "convolution",
) -> ResNet:
    """The ResNet-18 of Bi-Real Net: a shortcut around each convolution, signs of the sum.

    Args:
        num_classes: outputs.
        in_chans: channels of images.
        stem: ``"large"`` for ImageNet, ``"small"`` for CIFAR.
        downsample: ``"convolution"``, as the paper has it, or ``"pad"``, without parameters.

    Example:
        >>> import torch
        >>> bireal_resnet18(10, stem="small")(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])

    Reference: Liu et al., Bi-Real Net, ECCV 2018, section 3.
    """
    return _resnet18(num_classes, in_chans, "bireal", stem, downsample)


def reactnet_resnet18(
    num_classes: int = 1000,
    in_chans: int = 3,
    stem: Stem = "large",
    downsample: Downsample = "convolution",
) -> ResNet:
    """Bi-Real's ResNet-18 with an RPReLU behind each addition, as ReActNet has it.

    Its other half, a learned threshold for each channel of what is coded, comes with the codes:
    ``binarize(model, activations=Activations(scale=None, has_threshold=True))``.

    Args:
        num_classes: outputs.
        in_chans: channels of images.
        stem: ``"large"`` for ImageNet, ``"small"`` for CIFAR.
        downsample: as in :func:`bireal_resnet18`.

    Reference: Liu et al., ReActNet, ECCV 2020, section 4.
    """
    return _resnet18(num_classes, in_chans, "reactnet", stem, downsample)


def _resnet18(num_classes: int, in_chans: int, order: Order, stem: Stem, downsample: Downsample) -> ResNet:
    widths = (64, 128, 256, 512)
    return ResNet((2, 2, 2, 2), widths, num_classes, in_chans, order, "convolution", downsample, stem)
