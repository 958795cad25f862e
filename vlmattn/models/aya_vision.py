"""Aya Vision and Command A Vision: tiles between <|START_OF_IMG|> and <|END_OF_IMG|>, a Cohere 2 language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Matched, Tiled


@register_family
class AyaVision(Matched, Tiled):
    """Tiles have a name before them (Aya) or a line break behind (Command A). Three layers with a window and rotary
    positions, then one without either; attention and MLP in parallel."""

    model_types: ClassVar[Mapping[str, str]] = {
        "aya_vision": "CohereLabs/aya-vision-8b",
        "cohere2_vision": "CohereLabs/command-a-vision-07-2025",
    }
    first: ClassVar[str] = "<|START_OF_IMG|>"
