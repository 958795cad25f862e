"""ERNIE 4.5 VL: images of any size between markers, experts for text and for images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.grids import Spatial
from vlmattn.models.registry import register_family


@register_family
class Ernie45VL(Spatial):
    """Frames of a video are merged in pairs."""

    model_types: ClassVar[Mapping[str, str]] = {"ernie4_5_vl_moe": "baidu/ERNIE-4.5-VL-28B-A3B-PT"}
    markers: ClassVar[tuple[str, ...]] = (
        "image_start_token_id",
        "image_end_token_id",
        "video_start_token_id",
        "video_end_token_id",
    )
