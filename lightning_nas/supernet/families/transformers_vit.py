"""transformers' ViT: what of it is elastic, and its spaces."""

from __future__ import annotations

from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, ViTMLP, ViTModel

from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._presets import DYNAST, INSTATUNE
from lightning_nas.supernet.families._transformers import whole_classes
from lightning_nas.supernet.families._transformers_vision import Tower, VisionAdapter

__all__ = ["TransformersViT"]


class TransformersViT(VisionAdapter):
    """Adapter of transformers' ViT.

    Elastic: ``"depth"``, ``"layers.{i}.heads"``, ``"layers.{i}.mlp"`` (or ``"heads"`` and ``"mlp"``, one
    value for all blocks).
    """

    name = "transformers_vit"
    presets = {"instatune": INSTATUNE, "dynast": DYNAST}  # noqa: RUF012
    towers = (Tower(ViTModel, "layers", {"": ViTLayer, "attention": ViTAttention, "mlp": ViTMLP}),)


for _network in whole_classes(
    "vit.modeling_vit", "ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"
):
    families.register(_network)(TransformersViT())
