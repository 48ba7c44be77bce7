"""transformers' BEiT: what of it is elastic, and its spaces."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.beit.modeling_beit import (
    BeitAttention,
    BeitLayer,
    BeitMLP,
    BeitModel,
    BeitRelativePositionBias,
)

from lightning_nas.supernet.adapter import Reader
from lightning_nas.supernet.anatomy import Segment, Sizes
from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._presets import INSTATUNE
from lightning_nas.supernet.families._transformers import whole_classes
from lightning_nas.supernet.families._transformers_vision import Tower, VisionAdapter

__all__ = ["TransformersBEiT"]


class TransformersBEiT(VisionAdapter):
    """Adapter of transformers' BEiT.

    Elastic: ``"depth"``, ``"layers.{i}.heads"``, ``"layers.{i}.mlp"`` (or ``"heads"`` and ``"mlp"``, one
    value for all blocks). Each head takes its column of the block's relative position bias along.

    Where the blocks share one bias (``config.use_shared_relative_position_bias``), the model adds the same
    scores to the heads of every block. All blocks then run the same heads, and ``"heads"`` is the only choice
    of them; their order stays, since a head of one block cannot move without those of the others.
    """

    name = "transformers_beit"
    presets = {"instatune": INSTATUNE}  # noqa: RUF012
    towers = (Tower(BeitModel, "layers", {"": BeitLayer, "attention": BeitAttention, "mlp": BeitMLP}),)

    def read(
        self, reader: Reader, name: str, tower: Tower, prefix: str = "", heads: str | None = None
    ) -> None:
        """Read the network and its relative position biases."""
        network = reader.model.get_submodule(name)
        if network.shared_position_bias is not None:
            shared = f"{name}.shared_position_bias".lstrip(".")
            blocks = (f"{name}.layers.{i}".lstrip(".") for i in range(len(network.layers)))
            units = network.shared_position_bias.relative_position_bias_table.shape[1]
            targets = (shared, *(f"{block}.attention" for block in blocks))
            heads = reader.group("heads", units, ("heads",), targets)
            _bias(reader, shared, heads)
        super().read(reader, name, tower, prefix, heads)
        for i, block in enumerate(reader.stages[0].blocks):
            if reader.model.get_submodule(block).relative_position_bias is not None:
                _bias(reader, f"{block}.relative_position_bias", heads or f"layers.{i}.heads")

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Correct the config of a copy, with the stages that it would offer as a backbone."""
        super().trim(model, kept, sizes)
        for name, _ in self._found(model):
            network: Any = model.get_submodule(name)
            config = network.config
            if len(config.stage_names) != config.num_hidden_layers + 1:
                config.stage_names = ["stem", *(f"stage{i + 1}" for i in range(config.num_hidden_layers))]
                config.set_output_features_output_indices(out_features=None, out_indices=None)


def _bias(reader: Reader, name: str, heads: str) -> None:
    bias = reader.known(name, (BeitRelativePositionBias,), "relative position bias")
    distances, units = bias.relative_position_bias_table.shape
    axes = {"relative_position_bias_table": ((Segment(distances),), (Segment(units, 1, heads),))}
    reader.part(name, axes)


for _network in whole_classes(
    "beit.modeling_beit", "BeitModel", "BeitForImageClassification", "BeitForMaskedImageModeling"
):
    families.register(_network)(TransformersBEiT())
