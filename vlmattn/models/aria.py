"""Aria: 128 or 256 query tokens for each image or crop, a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece
from vlmattn.models.registry import register_family


class Aria(Family):
    """Image tokens are made by cross-attention of queries over the tower, so the tower is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"aria": "rhymes-ai/Aria"}

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        return ()  # every query sees all patches


register_family(Aria())
