"""Spaces from papers that several families of base-sized vision transformers share."""

from __future__ import annotations

from lightning_nas.supernet.adapter import Preset

__all__ = ["DYNAST", "INSTATUNE"]

_BASE = {"depth": 12, "heads": 12, "mlp": 3072}
INSTATUNE = Preset(
    _BASE, {"depth": (11, 12), "heads": (6, 8, 10, 12), "mlp": (2048, 2560, 3072), "keep": "first"}
)
DYNAST = Preset(
    _BASE, {"depth": (10, 11, 12), "heads": (6, 8, 10, 12), "mlp": (1024, 2048, 3072), "keep": "first"}
)
