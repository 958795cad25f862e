"""Video-LLaVA: images (``pixel_values_images``) and videos of eight frames, a tower for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.inputs import encoded_lengths, even_lengths
from vlmattn.models.registry import register_family


@register_family
class VideoLlava(Family):
    """All images have the same number of tokens and no separators; a video is one run."""

    model_types: ClassVar[Mapping[str, str]] = {"video_llava": "LanguageBind/Video-LLaVA-7B-hf"}
    square: ClassVar[bool] = True

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        if inputs.get("pixel_values_videos") is not None:
            return encoded_lengths(inputs)
        return even_lengths(model, inputs, "pixel_values_images")
