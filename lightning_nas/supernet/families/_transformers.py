"""What every family of transformers' networks shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet.adapter import Adapter
from lightning_nas.supernet.anatomy import Sizes

__all__ = ["ATTENTIONS", "TransformersAdapter", "refuse_attention", "whole_classes"]

ATTENTIONS = ("eager", "sdpa")


class TransformersAdapter(Adapter):
    """An adapter that reads what transformers' models have in common: configs, outputs, attention by name."""

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """Let a copy install its own hooks for ``output_hidden_states`` anew: hooks are not copied."""
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.__dict__.pop("_output_capturing_hooks_installed", None)

    def unfuse(self, model: nn.Module) -> None:
        """Attention as two matrix products, which operation counters see."""
        for module in model.modules():
            if (config := getattr(module, "config", None)) is not None:
                config._attn_implementation = "eager"

    def output(self, model: nn.Module, batch: Any) -> Any:
        """A batch is a dict of keywords, or a tuple whose first element is one, or is the first input."""
        if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Mapping):
            batch = batch[0]
        return super().output(model, batch)

    def returns_features(self, model: nn.Module) -> bool:
        """Whether the model is one without a head."""
        return isinstance(model, PreTrainedModel) and model.base_model is model


def refuse_attention(model: Any) -> None:
    """Refuse attention that is run by code which may not take fewer heads.

    Raises:
        UnsupportedError: naming those that do.
    """
    chosen = getattr(model.config, "_attn_implementation", "eager")
    if chosen not in ATTENTIONS:
        raise UnsupportedError(
            f"Supernet: attn_implementation={chosen!r} is not supported; load the model with "
            f"attn_implementation='sdpa' or 'eager'."
        )


def whole_classes(module: str, *names: str) -> tuple[str, ...]:
    """Full names of the network classes of one of transformers' files, to register."""
    return tuple(f"transformers.models.{module}.{name}" for name in names)
