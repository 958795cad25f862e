"""Mistral Small 3.1 and Ministral 3: a Pixtral tower whose patches are merged, images of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from transformers import PreTrainedModel

from vlmattn.models.llava import Llava
from vlmattn.models.registry import register_family


@register_family
class Mistral3(Llava):
    """Every row of an image ends in [IMG_BREAK] or [IMG_END], so an image is several runs."""

    model_types: ClassVar[Mapping[str, str]] = {"mistral3": "mistralai/Mistral-Small-3.1-24B-Instruct-2503"}

    def patch(self, model: PreTrainedModel) -> int:
        return super().patch(model) * int(model.config.spatial_merge_size)
