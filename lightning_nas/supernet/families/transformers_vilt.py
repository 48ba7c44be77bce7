"""transformers' ViLT, one encoder for text and image: what of it is elastic."""

from __future__ import annotations

from transformers.models.vilt.modeling_vilt import (
    ViltAttention,
    ViltIntermediate,
    ViltLayer,
    ViltModel,
    ViltOutput,
    ViltSelfAttention,
    ViltSelfOutput,
)

from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._transformers import whole_classes
from lightning_nas.supernet.families._transformers_vision import Tower, VisionAdapter

__all__ = ["TransformersViLT"]


class TransformersViLT(VisionAdapter):
    """Adapter of transformers' ViLT.

    Elastic: ``"depth"``, ``"layers.{i}.heads"``, ``"layers.{i}.mlp"`` (or ``"heads"`` and ``"mlp"``, one
    value for all blocks). ViLT draws the order of an image's patches at random, also in evaluation: equal
    random states give equal outputs.
    """

    name = "transformers_vilt"
    towers = (
        Tower(
            ViltModel,
            "encoder.layer",
            {
                "": ViltLayer,
                "attention": ViltAttention,
                "attention.attention": ViltSelfAttention,
                "attention.output": ViltSelfOutput,
                "intermediate": ViltIntermediate,
                "output": ViltOutput,
            },
            attention="attention.attention",
            inputs=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
            output="attention.output.dense",
            mlp=("intermediate.dense", "output.dense"),
            width="all_head_size",
            has_head_dim=False,
            hides_dropped=True,
        ),
    )


for _network in whole_classes(
    "vilt.modeling_vilt",
    "ViltModel",
    "ViltForImageAndTextRetrieval",
    "ViltForImagesAndTextClassification",
    "ViltForMaskedLM",
    "ViltForQuestionAnswering",
    "ViltForTokenClassification",
):
    families.register(_network)(TransformersViLT())
