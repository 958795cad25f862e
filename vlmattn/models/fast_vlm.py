"""FastVLM: a convolutional tower, 256 tokens for each image, without separators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel

from vlmattn.models.base import Family, encoded_lengths, register_family


class FastVLM(Family):
    """All images have the same number of tokens; the tower (of timm) has hardly any attention and is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"fast_vlm": "KamilaMila/FastVLM-7B"}

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        pixels = inputs.get("pixel_values")
        if (found := encoded_lengths(inputs)) is not None or pixels is None or inputs.get("input_ids") is None:
            return found
        return [int((inputs["input_ids"] == model.config.image_token_id).sum()) // len(pixels)] * len(pixels)


register_family(FastVLM())
