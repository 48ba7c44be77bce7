"""Tiny networks whose costs can be computed by hand."""

from __future__ import annotations

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_nas.supernet import Supernet, default_space, elastic


class Residual(nn.Module):
    """``x + down(relu(up(x)))`` on ``(1, 5, width)``, with 2 or 8 hidden units."""

    def __init__(
        self, width: int = 4, hidden=(2, 8), bias: bool = True, act: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.up = elastic(nn.Linear(width, hidden[-1], bias=bias), out=hidden)
        self.act = nn.ReLU() if act is None else act
        self.down = nn.Linear(hidden[-1], width, bias=bias)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


def residual(**settings) -> Supernet:
    torch.manual_seed(0)
    return Supernet(Residual(**settings))


def tiny_vit(**settings) -> VisionTransformer:
    sizes = {"img_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 12, "depth": 4, "num_heads": 3}
    torch.manual_seed(0)
    return VisionTransformer(**(sizes | settings)).eval()


def vit_with_widths() -> Supernet:
    model = tiny_vit()
    return Supernet(model, default_space(model, heads=(1, 2, 3), mlp=(12, 24, 48), embed=(8, 12)))


def bert() -> Supernet:
    config = BertConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=20, vocab_size=30
    )
    return Supernet(BertForSequenceClassification(config).eval())


def of_timm(name: str, **settings) -> Supernet:
    return Supernet(timm.create_model(name, **settings).eval())


IMAGE = torch.zeros(1, 3, 32, 32)
NETWORKS = {
    "vit": lambda: (vit_with_widths(), torch.zeros(1, 3, 8, 8)),
    "bert": lambda: (bert(), {"input_ids": torch.arange(7)[None] + 3}),
    "resnet": lambda: (of_timm("resnet18", num_classes=5), IMAGE),
    "swin": lambda: (
        of_timm(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 2, 3, 1), embed_dim=24
        ),
        IMAGE,
    ),
    "efficientnet": lambda: (of_timm("mobilenetv2_035", num_classes=5), IMAGE),
}
