"""Video-LLaVA: images (``pixel_values_images``) and videos of eight frames, a tower for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family


@register_family
class VideoLlava(Family):
    """Images have no separators; a video is one run."""

    model_types: ClassVar[Mapping[str, str]] = {"video_llava": "LanguageBind/Video-LLaVA-7B-hf"}
    square: ClassVar[bool] = True
    even: ClassVar[bool] = True
