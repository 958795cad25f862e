"""Aria: 128 or 256 query tokens for each image or crop, a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family


@register_family
class Aria(Family):
    """Image tokens are made by cross-attention of queries over the tower, so the tower is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"aria": "rhymes-ai/Aria"}
    separated: ClassVar[bool] = True
