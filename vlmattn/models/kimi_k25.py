"""Kimi K2.5: images of any size, a DeepSeek V3 language model with latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.base import Family, register_family


class KimiK25(Family):
    """Keys are longer than values; positions are counted in one dimension."""

    model_types: ClassVar[Mapping[str, str]] = {"kimi_k25": "moonshotai/Kimi-K2.5"}
    markers: ClassVar[tuple[str, ...]] = ("vision_start_token_id", "vision_end_token_id")


register_family(KimiK25())
