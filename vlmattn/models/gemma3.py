"""Gemma 3: 256 tokens of an image see each other both ways; five layers with a window, then one without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family


@register_family
class Gemma3(Family):
    """Every image lies between <start_of_image> and <end_of_image>, and so does every crop of pan and scan, which
    counts as an image. Layers with a window have a rotary table of their own."""

    model_types: ClassVar[Mapping[str, str]] = {
        "gemma3": "google/gemma-3-4b-it",
        "shieldgemma2": "google/shieldgemma-2-4b-it",
    }
    markers: ClassVar[tuple[str, ...]] = ("boi_token_index", "eoi_token_index")
    square: ClassVar[bool] = True
    causal: ClassVar[bool] = False
