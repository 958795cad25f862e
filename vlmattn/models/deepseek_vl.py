"""DeepSeek-VL, and its larger form with a second tower for fine detail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel

from vlmattn.models.base import Family, encoded_lengths, register_family


class DeepseekVL(Family):
    """576 tokens for each image, without separators."""

    model_types: ClassVar[Mapping[str, str]] = {
        "deepseek_vl": "deepseek-community/deepseek-vl-1.3b-chat",
        "deepseek_vl_hybrid": "deepseek-community/deepseek-vl-7b-chat",
    }

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        pixels = inputs.get("pixel_values")
        if (found := encoded_lengths(inputs)) is not None or pixels is None or inputs.get("input_ids") is None:
            return found
        return [int((inputs["input_ids"] == model.config.image_token_id).sum()) // len(pixels)] * len(pixels)


register_family(DeepseekVL())
