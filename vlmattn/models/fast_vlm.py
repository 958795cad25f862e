"""FastVLM: a convolutional tower, 256 tokens for each image, without separators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.inputs import even_lengths
from vlmattn.models.registry import register_family


@register_family
class FastVLM(Family):
    """All images have the same number of tokens; the tower (of timm) has hardly any attention and is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"fast_vlm": "KamilaMila/FastVLM-7B"}
    square: ClassVar[bool] = True

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        return even_lengths(model, inputs)
