"""InternVL 2.5, 3 and 3.5 in their Hugging Face form: all tiles of an image in one run between <img> and </img>."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece
from vlmattn.models.registry import register_family
from vlmattn.models.tiles import matched


class InternVL(Family):
    """Patches are shuffled into tokens, so the tower is not looked at. Frames of a video count as images."""

    model_types: ClassVar[Mapping[str, str]] = {"internvl": "OpenGVLab/InternVL3-8B-hf"}

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        return matched(self, model, inputs, slots)


register_family(InternVL())
