"""Command A Vision: tiles with a line break after each between <|START_OF_IMG|> and <|END_OF_IMG|>."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.aya_vision import AyaVision
from vlmattn.models.registry import register_family


class Cohere2Vision(AyaVision):
    model_types: ClassVar[Mapping[str, str]] = {"cohere2_vision": "CohereLabs/command-a-vision-07-2025"}


register_family(Cohere2Vision())
