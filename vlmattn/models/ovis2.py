"""Ovis2: image tokens are mixtures of a visual vocabulary; indicator tokens stand around an image and between its tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from transformers import PreTrainedModel

from vlmattn.models.base import register_family
from vlmattn.models.tiles import Tiled


class Ovis2(Tiled):
    """The first of the indicators, <IMG_START>, opens an image."""

    model_types: ClassVar[Mapping[str, str]] = {"ovis2": "thisisiron/Ovis2-8B-hf"}
    first: ClassVar[str] = "<IMG_START>"

    def known_marks(self, model: PreTrainedModel) -> dict[str, int]:
        return {self.first: model.config.visual_indicator_token_ids[0]}

    def image_ids(self, model: PreTrainedModel) -> tuple[int, ...]:
        return (*super().image_ids(model), *model.config.visual_indicator_token_ids)


register_family(Ovis2())
