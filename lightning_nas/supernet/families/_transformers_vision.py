"""What transformers' vision networks share: towers of blocks, each an attention and an MLP, told by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet.adapter import Reader, length
from lightning_nas.supernet.anatomy import Anatomy, Segment, Sizes
from lightning_nas.supernet.families._transformers import TransformersAdapter, refuse_attention

__all__ = ["Tower", "VisionAdapter"]


@dataclass(frozen=True)
class Tower:
    """A kind of network whose blocks follow each other, and where its blocks keep what is elastic.

    Args:
        network: its class.
        blocks: name of the container within it.
        classes: the exact classes of a block (``""``) and of modules within it; a subclass may compute
            anything.
        attention: name within a block of the module that splits into heads.
        inputs: names within a block of the projections to queries, keys and values.
        output: of the projection that takes the heads' outputs.
        mlp: of the two linear layers of the MLP.
        heads: the attribute of the attention that counts its heads.
        width: the attribute of the attention that is their width together, if it has one.
        has_head_dim: whether the config can say how large a head is; else that is its width over its heads.
        hides_dropped: see :class:`~lightning_nas.supernet.anatomy.Stage`.
        prefix: of the names of choices, in a network of several towers.
    """

    network: type[nn.Module]
    blocks: str
    classes: Mapping[str, type[nn.Module]]
    attention: str = "attention"
    inputs: tuple[str, ...] = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    output: str = "attention.o_proj"
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    heads: str = "num_attention_heads"
    width: str | None = None
    has_head_dim: bool = True
    hides_dropped: bool = False
    prefix: str = ""


class VisionAdapter(TransformersAdapter):
    """An adapter of networks of towers, which only says what these are.

    A copy's config has its number of blocks, and its heads and hidden units where all blocks have as many and
    the config can say so.
    """

    towers: ClassVar[tuple[Tower, ...]]

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a network.

        Raises:
            UnsupportedError: for a block, attention, MLP or linear layer of a class not known here.
        """
        reader, found = Reader(model), list(self._found(model))
        if not found or len({tower.prefix for _, tower in found}) < len(found):
            raise UnsupportedError(
                f"Supernet: this {type(model).__name__} holds {len(found)} networks "
                f"({', '.join(name or 'itself' for name, _ in found)}); it must hold one of each kind: "
                f"{', '.join(tower.network.__name__ for tower in self.towers)}. Give the network inside."
            )
        for name, tower in found:
            refuse_attention(model.get_submodule(name))
            self.read(reader, name, tower, tower.prefix if len(found) > 1 else "")
        return reader.anatomy()

    def read(
        self, reader: Reader, name: str, tower: Tower, prefix: str = "", heads: str | None = None
    ) -> None:
        """Read one tower.

        Args:
            reader: of the whole network.
            name: of the tower within it.
            tower: its kind.
            prefix: of the names of its choices.
            heads: the group of the heads of all blocks together, where they are bound to each other.
        """
        container = f"{name}.{tower.blocks}".lstrip(".")
        for i, block in enumerate(
            reader.stage(container, f"{prefix}depth", hides_dropped=tower.hides_dropped)
        ):
            for within, cls in tower.classes.items():
                reader.known(f"{block}.{within}".rstrip("."), (cls,), within or "block")
            _attention(reader, tower, block, f"{prefix}layers.{i}.heads", f"{prefix}heads", heads)
            _mlp(reader, tower, block, f"{prefix}layers.{i}.mlp", f"{prefix}mlp")

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Correct the configs of a copy's towers."""
        super().trim(model, kept, sizes)
        for name, tower in self._found(model):
            network: Any = model.get_submodule(name)
            blocks = network.get_submodule(tower.blocks)
            network.config.num_hidden_layers = len(blocks)
            units = {block.get_submodule(tower.mlp[0]).out_features for block in blocks}
            if len(units) == 1:
                network.config.intermediate_size = units.pop()
            heads = {getattr(block.get_submodule(tower.attention), tower.heads) for block in blocks}
            if tower.has_head_dim and heads != {network.config.num_attention_heads} and len(heads) == 1:
                network.config.head_dim = blocks[0].get_submodule(tower.attention).head_dim
                network.config.num_attention_heads = heads.pop()

    def _found(self, model: nn.Module) -> Iterator[tuple[str, Tower]]:
        for name, module in model.named_modules():
            for tower in self.towers:
                if isinstance(module, tower.network):
                    yield name, tower


def _attention(reader: Reader, tower: Tower, block: str, own: str, shared: str, bound: str | None) -> None:
    attention, output = f"{block}.{tower.attention}", f"{block}.{tower.output}"
    count = getattr(reader.model.get_submodule(attention), tower.heads)
    group = bound or reader.group(own, count, (own, shared), (block, attention), output)
    first = reader.model.get_submodule(f"{block}.{tower.inputs[0]}")
    heads = (Segment(count, first.out_features // count, group),)
    width = (Segment(first.in_features),)
    attributes = {tower.heads: length((Segment(count, 1, group),))}
    if tower.width is not None:
        attributes[tower.width] = length(heads)
    reader.part(attention, {}, attributes)
    for projection in tower.inputs:
        reader.linear(f"{block}.{projection}", heads, width)
    reader.linear(output, width, heads)
    for _ in ("scores", "values"):
        reader.operation(attention, "pair", heads)


def _mlp(reader: Reader, tower: Tower, block: str, own: str, shared: str) -> None:
    fc1, fc2 = (f"{block}.{layer}" for layer in tower.mlp)
    first = reader.model.get_submodule(fc1)
    modules = dict.fromkeys(layer.rpartition(".")[0] for layer in (fc1, fc2))
    group = reader.group(own, first.out_features, (own, shared), (block, *modules), fc2)
    hidden, width = (Segment(first.out_features, 1, group),), (Segment(first.in_features),)
    reader.linear(fc1, hidden, width)
    reader.linear(fc2, width, hidden)
