"""Aya Vision: tiles named by tokens between <|START_OF_IMG|> and <|END_OF_IMG|>, a Cohere 2 language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.image_layout import Piece
from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Tiled, matched


class AyaVision(Tiled):
    """Three layers with a window and rotary positions, then one without either; attention and MLP in parallel."""

    model_types: ClassVar[Mapping[str, str]] = {"aya_vision": "CohereLabs/aya-vision-8b"}
    first: ClassVar[str] = "<|START_OF_IMG|>"
    refused: ClassVar[Mapping[str, str]] = {
        "pruning": "some of its layers have a sliding window, which counts tokens",
    }

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        return matched(self, model, inputs, slots)


register_family(AyaVision())
