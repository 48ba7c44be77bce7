"""What timm's convolutional networks share: streams of channels, batch norms, squeeze and excitation."""

from __future__ import annotations

from dataclasses import replace

from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.squeeze_excite import SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet.adapter import Reader, multiples
from lightning_nas.supernet.anatomy import Anatomy, Axis, Segment
from lightning_nas.supernet.layers import plain_class

__all__ = ["ConvReader"]

CONVS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)
MULTIPLE = 8  # channels that shares are rounded to, as in MobileNet, Once-for-All and BigNAS


class ConvReader(Reader):
    """Reads a network whose stages pass a stream of channels on; the blocks of a stage add to it."""

    def anatomy(self) -> Anatomy:
        """What was collected; blocks of one size share a choice of their stage, others have their own."""
        last: dict[str, int] = {g.choices[-1]: g.units for g in self.groups.values() if g.choices}
        for name, group in self.groups.items():
            if group.choices and last[group.choices[-1]] != group.units:
                self.groups[name] = replace(group, choices=group.choices[:1])
        return super().anatomy()

    def stream(self, name: str, units: int, *targets: str) -> Axis:
        """The channels that leave a stage: one group, until a layer leads them elsewhere."""
        self.group(name, units, (name,), targets, sizes=multiples(units, MULTIPLE))
        return (Segment(units, group=name),)

    def leaves(self, stream: Axis, way_out: str) -> None:
        """Name the layer through which a stream goes on where it ends: from it importance is read."""
        group = self.groups[stream[0].group or ""]
        self.groups[group.name] = replace(group, way_out=(way_out, "weight"))

    def stays_whole(self, stream: Axis) -> None:
        """Let a stream be as wide as it is: it leaves the network, or into a layer that is not known."""
        group = self.groups[stream[0].group or ""]
        self.groups[group.name] = replace(group, choices=())

    def ends(self, stream: Axis, head: str, copies: int) -> None:
        """A stream ends in the head: a linear layer, or what the user put there.

        Args:
            stream: of the last stage.
            head: name of the layer.
            copies: how often the stream comes there: twice by average and maximum.
        """
        if plain_class(self.model.get_submodule(head)) is nn.Linear:
            self.linear(head, (Segment(self.model.get_submodule(head).out_features),), stream * copies)
            self.leaves(stream, head)
        else:
            self.stays_whole(stream)

    def hidden(self, stage: int, layer: int, block: str, conv: str, way_out: str, inner: str = "") -> Axis:
        """The channels inside a block, as the choice ``expand`` says.

        Args:
            stage: index.
            layer: index of the block in it.
            block: its name.
            conv: name of the layer with as many outputs; where it is grouped, a unit is one of its groups.
            way_out: name of the layer that takes them as inputs.
            inner: suffix of a second group of the same size in the block.
        """
        module = self.known(conv, CONVS, "convolution")
        size = module.out_channels // module.groups if module.groups > 1 else 1
        units = module.out_channels // size
        name = f"stages.{stage}.layers.{layer}.expand"
        self.group(
            f"{name}{inner}",
            units,
            (name, f"stages.{stage}.expand"),
            (block, conv),
            way_out,
            multiples(units, MULTIPLE) if size == 1 else (),
        )
        return (Segment(units, size, f"{name}{inner}"),)

    def kernel(self, stage: int, layer: int, block: str, conv: str) -> str | None:
        """The group of a kernel's size, where it is above 3 and its padding keeps the centre in place."""
        module = self.known(conv, CONVS, "convolution")
        size = module.kernel_size[0]
        same = tuple(d * (size - 1) // 2 for d in module.dilation)
        is_centred = type(module) is Conv2dSame or module.padding == same
        if module.kernel_size != (size, size) or size <= 3 or size % 2 == 0 or not is_centred:
            return None
        name = f"stages.{stage}.layers.{layer}.kernel"
        choices = (name, f"stages.{stage}.kernel")
        return self.group(name, size, choices, (block, conv), sizes=tuple(range(3, size + 1, 2)))

    def conv(self, name: str, rows: Axis, columns: Axis, kernel: str | None = None) -> None:
        """A convolution of timm."""
        self.convolution(name, rows, columns, kernel, CONVS)

    def channels(self, name: str, axis: Axis) -> None:
        """A layer that gives back the channels it gets: a norm, squeeze and excitation, an activation."""
        module = self.model.get_submodule(name)
        if isinstance(module, nn.BatchNorm2d):
            self.batch_norm(name, axis, NORMS)
            self.plain(f"{name}.act" if hasattr(module, "act") else "")
        elif type(module) in (SqueezeExcite, SEModule):
            ends = ("conv_reduce", "conv_expand") if type(module) is SqueezeExcite else ("fc1", "fc2")
            inside = (Segment(self.model.get_submodule(f"{name}.{ends[0]}").out_channels),)
            self.conv(f"{name}.{ends[0]}", inside, axis)
            self.conv(f"{name}.{ends[1]}", axis, inside)
        else:
            self.plain(name)

    def plain(self, name: str) -> None:
        """A layer that works on any number of channels, since it keeps nothing for each of them.

        Raises:
            UnsupportedError: for one that does.
        """
        module = self.model.get_submodule(name) if name else nn.Identity()
        if any(tensor.numel() > 1 for tensor in (*module.parameters(), *module.buffers())):
            raise UnsupportedError(
                f"Supernet: {name} is a {type(module).__module__}.{type(module).__qualname__}, a layer whose "
                f"channels cannot be left out. Supported: {', '.join(cls.__name__ for cls in NORMS)}, "
                "SqueezeExcite, SEModule, and layers without weights."
            )
