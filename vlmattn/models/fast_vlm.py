"""FastVLM: a convolutional tower, 256 tokens for each image, without separators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family


@register_family
class FastVLM(Family):
    """The tower (of timm) has hardly any attention and is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"fast_vlm": "KamilaMila/FastVLM-7B"}
    square: ClassVar[bool] = True
    even: ClassVar[bool] = True
