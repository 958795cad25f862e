"""DeepSeek-VL, and its larger form with a second tower for fine detail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family


@register_family
class DeepseekVL(Family):
    """576 tokens for each image, without separators."""

    model_types: ClassVar[Mapping[str, str]] = {
        "deepseek_vl": "deepseek-community/deepseek-vl-1.3b-chat",
        "deepseek_vl_hybrid": "deepseek-community/deepseek-vl-7b-chat",
    }
    square: ClassVar[bool] = True
    even: ClassVar[bool] = True
