"""transformers' CLIP: what of its two towers is elastic."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers.models.clip.modeling_clip import (
    CLIPMLP,
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
)

from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._transformers import whole_classes
from lightning_nas.supernet.families._transformers_vision import Tower, VisionAdapter

__all__ = ["TransformersCLIP"]

_VISION = Tower(
    CLIPVisionModel,
    "encoder.layers",
    {"": CLIPEncoderLayer, "self_attn": CLIPAttention, "mlp": CLIPMLP},
    attention="self_attn",
    inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.out_proj",
    heads="num_heads",
    has_head_dim=False,
    prefix="vision.",
)


class TransformersCLIP(VisionAdapter):
    """Adapter of transformers' CLIP, of both towers or of one.

    Elastic in a network of both: ``"vision.depth"``, ``"vision.layers.{i}.heads"``,
    ``"vision.layers.{i}.mlp"`` (or ``"vision.heads"`` and ``"vision.mlp"``, one value for all blocks), and
    the same of ``"text."``. In a network of one tower these names have no prefix.

    With ``return_loss=True`` the first tensor of a ``CLIPModel``'s output is its loss: tell a callback that
    distils what to read, as ``output=lambda output: output.logits_per_image``.
    """

    name = "transformers_clip"
    towers = (_VISION, replace(_VISION, network=CLIPTextModel, prefix="text."))

    def returns_features(self, model: nn.Module) -> bool:
        """Whether what leaves are states or embeddings of one tower."""
        return not isinstance(model, CLIPModel | CLIPForImageClassification)


for _network in whole_classes(
    "clip.modeling_clip",
    "CLIPModel",
    "CLIPForImageClassification",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
):
    families.register(_network)(TransformersCLIP())
