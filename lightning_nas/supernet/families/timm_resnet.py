"""timm's ResNet: residual blocks of two or three convolutions in stages, and Once-for-All's space of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from lightning_nas.supernet.adapter import QUARTERS, Adapter, Preset, length
from lightning_nas.supernet.anatomy import Anatomy, Axis, Segment, Sizes
from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._timm_convolutions import CONVS, ConvReader

__all__ = ["TimmResNet"]

STAGES = ("layer1", "layer2", "layer3", "layer4")


def _once_for_all(model: Any) -> Mapping[str, Any]:
    stages = [model.get_submodule(name) for name in STAGES]
    last = stages[-1][-1]
    if not isinstance(last, Bottleneck):
        raise ValueError(
            f"The space 'ofa' is for a ResNet of Bottleneck blocks; this one has {type(last).__name__}. Use "
            "space='relative' or nas.supernet.default_space(model, depth=..., expand=..., width=...)."
        )
    whole = last.conv3.in_channels / last.conv3.out_channels
    return {
        "depth": {
            f"stages.{s}.depth": tuple(range(max(min(2, len(stage)), len(stage) - 2), len(stage) + 1))
            for s, stage in enumerate(stages)
        },
        "keep": "first",
        "expand": tuple(min(1.0, ratio / whole) for ratio in (0.2, 0.25, 0.35)),
        "width": (0.65, 0.8, 1.0),
    }


class TimmResNet(Adapter):
    """Adapter of timm's ResNets, with deep stems, average pooling in shortcuts, SE and ResNeXt among them.

    Elastic: ``"stages.{s}.depth"``; ``"stages.{s}.layers.{i}.expand"``, the channels inside a block (of a
    ResNeXt its groups), or ``"stages.{s}.expand"`` for all blocks of a stage; ``"stages.{s}.width"``, the
    channels that leave a stage, and ``"stem.width"``; where the first stage adds to the stem's channels
    without a projection (ResNet-18), ``"stem.width"`` is both. Widths are whole unless asked for
    (``width=(0.5, 1.0)``); the last one always is where no linear layer follows.

    The space ``"ofa"`` is Once-for-All's: up to two blocks fewer in each stage (two are left), the first ones
    kept; channels inside a block 0.2, 0.25 and 0.35 of what leaves it, as far as the network has them (a
    standard ResNet-50 has 0.25, and gives 0.2 and 0.25); widths 0.65, 0.8 and 1. Theirs is a network of
    4, 4, 6, 4 blocks and 0.35, with a stem of two elastic widths; here the stem has one.

    Reference: Cai et al., Once-for-All, ICLR 2020.
    """

    name = "timm_resnet"
    executions: tuple[str, ...] = ("slice",)
    default = {"expand": QUARTERS}  # noqa: RUF012
    presets = {"ofa": Preset({}, _once_for_all)}  # noqa: RUF012

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a ResNet.

        Raises:
            UnsupportedError: for a block, norm, attention or anti-aliasing layer of a class not known here.
        """
        return _ResNet(model).anatomy()

    def trim(self, model: Any, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Correct what timm records about the network."""
        widths = {"act1": model.bn1.num_features}
        for name in STAGES:
            if stage := list(model.get_submodule(name)):
                widths[name] = getattr(stage[-1], "conv3", stage[-1].conv2).out_channels
        model.feature_info = [
            {**info, "num_chs": widths.get(info["module"], info["num_chs"])} for info in model.feature_info
        ]


families.register(f"{ResNet.__module__}.{ResNet.__qualname__}")(TimmResNet())


class _ResNet(ConvReader):
    """Reads one ResNet, stage by stage."""

    def anatomy(self) -> Anatomy:
        stream = self._stem()
        for s, stage in enumerate(STAGES):
            if len(self.model.get_submodule(stage)):  # empty where timm pruned it
                stream = self._stage(s, stage, stream)
        copies = self.model.global_pool.feat_mult()
        self.ends(stream, "fc", copies)
        self.part("", {}, {"num_features": length(stream), "head_hidden_size": length(stream * copies)})
        return super().anatomy()

    def _stem(self) -> Axis:
        is_deep = isinstance(self.model.conv1, nn.Sequential)
        last = f"conv1.{len(self.model.conv1) - 1}" if is_deep else "conv1"
        conv = self.known(last, CONVS, "convolution")
        stream = self.stream("stem.width", conv.out_channels, "conv1")
        self.conv(last, stream, (Segment(conv.in_channels),))
        self.channels("bn1", stream)
        self.channels("act1", stream)
        self._sequence("maxpool", stream, stream)
        return stream

    def _stage(self, s: int, container: str, stream: Axis) -> Axis:
        for i, block in enumerate(self.stage(container, f"stages.{s}.depth", fixed=(0,))):
            module = self.known(block, (BasicBlock, Bottleneck), "block")
            convs = ("conv1", "conv2", "conv3") if isinstance(module, Bottleneck) else ("conv1", "conv2")
            out = stream
            if module.downsample is not None:
                width = module.get_submodule(convs[-1]).out_channels
                out = self.stream(f"stages.{s}.width", width, container)
                self.leaves(stream, self._sequence(f"{block}.downsample", out, stream))
            inside = self._hidden(s, i, block, convs)
            for j, (rows, columns) in enumerate(zip((*inside, out), (stream, *inside), strict=True), 1):
                self.conv(f"{block}.conv{j}", rows, columns)
                self.channels(f"{block}.bn{j}", rows)
                self.plain(f"{block}.act{j}")
            self.branch_ends.append(f"{block}.bn{len(convs)}")
            self.plain(f"{block}.aa")
            if module.se is not None:
                self.channels(f"{block}.se", out)
            stream = out
        return stream

    def _hidden(self, s: int, i: int, block: str, convs: tuple[str, ...]) -> list[Axis]:
        """The channels behind each convolution of a block but the last."""
        layers = [f"{block}.{conv}" for conv in convs]
        widths = [self.known(layer, CONVS, "convolution").out_channels for layer in layers[:-1]]
        if len(set(widths)) > 1:  # SENet-154: of two widths, one ratio would say nothing
            return [(Segment(width),) for width in widths]
        outer = self.hidden(s, i, block, layers[-2], layers[-1])
        if len(widths) == 1:
            return [outer]
        if self.model.get_submodule(layers[1]).groups > 1:
            return [outer, outer]
        return [self.hidden(s, i, block, layers[0], layers[1], ".inner"), outer]

    def _sequence(self, name: str, rows: Axis, columns: Axis) -> str:
        """A layer, or some in a row; returns the name of the convolution among them."""
        module, found = self.model.get_submodule(name), ""
        names = [f"{name}.{key}" for key, _ in module.named_children()] or [name]
        for layer in names:
            if isinstance(self.model.get_submodule(layer), nn.Conv2d):
                self.conv(layer, rows, columns)
                found = layer
            else:
                self.channels(layer, rows)
        return found
