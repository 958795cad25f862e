"""Emu3: images are tokens of a codebook, as many as their size wants, with one more at the end of each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.errors import UnsupportedError
from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, whole
from vlmattn.models.registry import register_family
from vlmattn.request import IMAGE


@register_family
class Emu3(Family):
    """Row ends stand on image tokens of the prompt too, so an image is one run."""

    model_types: ClassVar[Mapping[str, str]] = {"emu3": "BAAI/Emu3-Chat-hf"}
    separated: ClassVar[bool] = True

    def check(self, model: PreTrainedModel) -> None:
        if "<image>" not in (model.config.vocabulary_map or {}):
            raise UnsupportedError(
                "config.vocabulary_map of this Emu3 has no '<image>', so image tokens cannot be found"
            )

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return model.model.text_model  # type: ignore[no-any-return, union-attr]

    def placeholders(self, model: PreTrainedModel) -> dict[int, int]:
        return {model.config.vocabulary_map["<image>"]: IMAGE}

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        height, width = inputs["image_sizes"][image].tolist()
        side = model.model.vqmodel.vision_spatial_factor  # type: ignore[union-attr]
        return whole(len(slots), height // side, width // side, behind=1)
