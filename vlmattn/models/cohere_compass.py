"""Cohere Compass (North Micro Vision): the tower of Qwen3-VL, a language model with windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.grids import Spatial
from vlmattn.models.registry import register_family


@register_family
class CohereCompass(Spatial):
    """Layers with a window have rotary positions, those without have others."""

    model_types: ClassVar[Mapping[str, str]] = {"cohere_compass": "CohereLabs/North-Micro-Vision-Instruct"}
