"""Janus: reads images as 576 tokens of a SigLIP-like tower; the images that it makes are tokens of another kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family


@register_family
class Janus(Family):
    """Every image lies between <begin_of_image> and <end_of_image>. Edits act where text is generated."""

    model_types: ClassVar[Mapping[str, str]] = {"janus": "deepseek-community/Janus-Pro-7B"}
    separated: ClassVar[bool] = True
    square: ClassVar[bool] = True
