"""transformers' DeiT: what of it is elastic, and its spaces."""

from __future__ import annotations

from transformers.models.deit.modeling_deit import DeiTAttention, DeiTLayer, DeiTMLP, DeiTModel

from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._presets import DYNAST, INSTATUNE
from lightning_nas.supernet.families._transformers import whole_classes
from lightning_nas.supernet.families._transformers_vision import Tower, VisionAdapter

__all__ = ["TransformersDeiT"]


class TransformersDeiT(VisionAdapter):
    """Adapter of transformers' DeiT, with one head or with a second one that a teacher taught.

    Elastic: ``"depth"``, ``"layers.{i}.heads"``, ``"layers.{i}.mlp"`` (or ``"heads"`` and ``"mlp"``, one
    value for all blocks).
    """

    name = "transformers_deit"
    presets = {"instatune": INSTATUNE, "dynast": DYNAST}  # noqa: RUF012
    towers = (Tower(DeiTModel, "layers", {"": DeiTLayer, "attention": DeiTAttention, "mlp": DeiTMLP}),)


for _network in whole_classes(
    "deit.modeling_deit",
    "DeiTModel",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "DeiTForMaskedImageModeling",
):
    families.register(_network)(TransformersDeiT())
