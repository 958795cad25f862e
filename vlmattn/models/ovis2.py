"""Ovis2: image tokens are mixtures of a visual vocabulary; indicator tokens stand around images and tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from transformers import PreTrainedModel

from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Tiled


@register_family
class Ovis2(Tiled):
    """The first of the indicators, <IMG_START>, opens an image."""

    model_types: ClassVar[Mapping[str, str]] = {"ovis2": "thisisiron/Ovis2-8B-hf"}
    first: ClassVar[str] = "<IMG_START>"
    ahead: ClassVar[bool] = True

    def known_marker_ids(self, model: PreTrainedModel) -> dict[str, int]:
        return {self.first: model.config.visual_indicator_token_ids[0]}

    def row_ends(self, model: PreTrainedModel, gaps: Sequence[Sequence[int]]) -> list[bool]:
        _, _, _, row_end, _ = (
            model.config.visual_indicator_token_ids
        )  # the others open and close images, and part columns
        return [*(gap[-1] == row_end for gap in gaps[1:]), True]

    def image_ids(self, model: PreTrainedModel) -> tuple[int, ...]:
        return (*super().image_ids(model), *model.config.visual_indicator_token_ids)
