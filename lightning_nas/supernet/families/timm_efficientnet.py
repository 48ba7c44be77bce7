"""timm's EfficientNet and MobileNetV3: inverted residual blocks, and Once-for-All's space of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
)
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet.adapter import QUARTERS, Adapter, Preset, length
from lightning_nas.supernet.anatomy import Anatomy, Axis, Segment, Sizes
from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._timm_convolutions import CONVS, ConvReader

__all__ = ["TimmEfficientNet"]

BLOCKS = (InvertedResidual, DepthwiseSeparableConv, EdgeResidual, ConvBnAct)


def _once_for_all(model: Any) -> Mapping[str, Any]:
    for name, block in ((f"{s}.{i}", block) for s in range(1, 6) for i, block in enumerate(model.blocks[s])):
        if type(block) is InvertedResidual and block.conv_pw.out_channels == 6 * block.conv_pw.in_channels:
            continue
        raise ValueError(
            "The space 'ofa-mobilenetv3' is for inverted residual blocks with 6 times the channels inside; "
            f"blocks.{name} is none. Use space='relative' or nas.supernet.default_space(model, depth=..., "
            "expand=..., kernel=...)."
        )
    return {
        "depth": {f"stages.{s}.depth": (2, 3, 4) for s in range(1, 6)},
        "keep": "first",
        "expand": (3 / 6, 4 / 6, 6 / 6),
        "kernel": (3, 5, 7),
    }


class TimmEfficientNet(Adapter):
    """Adapter of timm's EfficientNets (V1, V2) and MobileNets (V2, V3), and others of the same blocks.

    Elastic: ``"stages.{s}.depth"``; ``"stages.{s}.layers.{i}.expand"``, the channels inside a block, and
    ``"stages.{s}.layers.{i}.kernel"``, the size of its kernel where that is above 3, as the centre of the
    whole one (see :func:`~lightning_nas.supernet.add_kernel_transforms`), or ``"stages.{s}.expand"`` and
    ``"stages.{s}.kernel"`` for the blocks of a stage that are alike; ``"stages.{s}.width"``, the channels
    that leave a stage, and ``"stem.width"``. A stage is an entry of ``model.blocks``. Widths are whole unless
    asked for (``width=(0.5, 1.0)``); a stage that adds to what comes in without a projection has none of its
    own.

    The space ``"ofa-mobilenetv3"`` is Once-for-All's, for a network of its shape: five stages of four blocks
    with kernels of 7 and 6 times the channels inside; depth 2 to 4, kernels 3, 5, 7, expand ratios 3, 4, 6.

    Reference: Cai et al., Once-for-All, ICLR 2020.
    """

    name = "timm_efficientnet"
    executions: tuple[str, ...] = ("slice",)
    default = {"expand": QUARTERS, "kernel": (3 / 7, 5 / 7, 1.0)}  # noqa: RUF012
    presets = {  # noqa: RUF012
        "ofa-mobilenetv3": Preset(
            {f"stages.{s}.depth": 4 for s in range(1, 6)} | {f"stages.{s}.kernel": 7 for s in range(1, 6)},
            _once_for_all,
        )
    }

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe an EfficientNet or MobileNet.

        Raises:
            UnsupportedError: for a block, convolution, norm or attention of a class not known here.
        """
        return _EfficientNet(model).anatomy()

    def trim(self, model: Any, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Correct what timm records about the network."""
        widths = {"bn1": model.conv_stem.out_channels}
        for s, stage in enumerate(model.blocks):
            widths[f"blocks.{s}"] = stage[-1].feature_info("bottleneck")["num_chs"]
        model.feature_info = [
            {**info, "num_chs": widths.get(info["module"], info["num_chs"])} for info in model.feature_info
        ]


for _network in (EfficientNet, MobileNetV3):
    families.register(f"{_network.__module__}.{_network.__qualname__}")(TimmEfficientNet())


class _EfficientNet(ConvReader):
    """Reads one network, block by block."""

    def anatomy(self) -> Anatomy:
        stem = self.known("conv_stem", CONVS, "convolution")
        stream = self.stream("stem.width", stem.out_channels, "conv_stem")
        self.conv("conv_stem", stream, (Segment(stem.in_channels),))
        self.channels("bn1", stream)
        for s, stage in enumerate(self.model.blocks):
            fixed = tuple(i for i, block in enumerate(stage) if not getattr(block, "has_skip", False))
            for i, name in enumerate(self.stage(f"blocks.{s}", f"stages.{s}.depth", fixed)):
                stream = self._block(s, i, name, stream)
        self._head(stream)
        return super().anatomy()

    def _block(self, s: int, i: int, name: str, stream: Axis) -> Axis:
        block = self.known(name, BLOCKS, "block")
        if getattr(block, "conv_s2d", None) is not None:
            raise UnsupportedError(f"Supernet: {name} moves space to depth, which cannot be sliced.")
        layers: tuple[tuple[str, str], ...] = (("conv", "bn1"),)
        if isinstance(block, InvertedResidual):
            layers = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
        elif isinstance(block, EdgeResidual):
            layers = (("conv_exp", "bn1"), ("conv_pwl", "bn2"))
        elif isinstance(block, DepthwiseSeparableConv):
            layers = (("conv_dw", "bn1"), ("conv_pw", "bn2"))
        convs = [f"{name}.{conv}" for conv, _ in layers]
        out = stream
        if not block.has_skip:
            width = self.known(convs[-1], CONVS, "convolution").out_channels
            out = self.stream(f"stages.{s}.{f'layers.{i}.' if i else ''}width", width, f"blocks.{s}", name)
            self.leaves(stream, convs[0] if layers[0][0] != "conv_dw" else convs[1])
        inside = stream
        if isinstance(block, InvertedResidual | EdgeResidual):
            inside = self.hidden(s, i, name, convs[-2], convs[-1])
        axes = (stream, *(inside,) * (len(layers) - 1), out)
        for j, (conv, norm) in enumerate(layers):
            kernel = self.kernel(s, i, name, convs[j]) if conv in ("conv_dw", "conv_exp") else None
            self.conv(convs[j], axes[j + 1], axes[j], kernel)
            self.channels(f"{name}.{norm}", axes[j + 1])
        if block.has_skip:
            self.branch_ends.append(f"{name}.{layers[-1][1]}")
        self.plain(f"{name}.aa")
        if hasattr(block, "se"):
            self.channels(f"{name}.se", inside)
        return out

    def _head(self, stream: Axis) -> None:
        is_mobile = isinstance(self.model, MobileNetV3)  # it pools before its last convolution
        copies = self.model.global_pool.feat_mult()
        features = length(stream)
        if type(self.model.conv_head) in CONVS:
            rows = (Segment(self.model.conv_head.out_channels),)
            self.conv("conv_head", rows, stream * copies if is_mobile else stream)
            self.leaves(stream, "conv_head")
            self.part("", {}, {"num_features": features} if is_mobile else {})
        else:
            self.ends(stream, "classifier", copies)
            self.part("", {}, {"num_features": features, "head_hidden_size": length(stream * copies)})
