"""Qwen2.5-VL: images of any size between <|vision_start|> and <|vision_end|>, M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel

from vlmattn.models.base import Family, register_family


class Qwen25VL(Family):
    """Images and videos are always separated by their markers, so unbroken runs are whole images."""

    model_types: ClassVar[Mapping[str, str]] = {"qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct"}

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        return None


register_family(Qwen25VL())
