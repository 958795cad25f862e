"""Mistral Small 3.1 and Ministral 3: a Pixtral tower whose patches are merged, images of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece
from vlmattn.models.llava import own_of_sizes, pixtral_layout, pixtral_lengths
from vlmattn.models.registry import register_family


@register_family
class Mistral3(Family):
    """Every row of an image ends in [IMG_BREAK] or [IMG_END], so an image is several runs."""

    model_types: ClassVar[Mapping[str, str]] = {"mistral3": "mistralai/Mistral-Small-3.1-24B-Instruct-2503"}

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        return pixtral_lengths(model, inputs, model.config.spatial_merge_size)

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        return pixtral_layout(model, inputs, image, slots, model.config.spatial_merge_size)

    def unpadded(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
        return own_of_sizes(inputs, rows)
