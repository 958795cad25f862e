"""PerceptionLM: an image in small and its tiles, all in one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece
from vlmattn.models.registry import register_family
from vlmattn.models.tiles import matched


class PerceptionLM(Family):
    """Patches are pooled into tokens, so the tower (of timm) is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"perception_lm": "facebook/Perception-LM-8B"}

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        return matched(self, model, inputs, slots, ahead=True)


register_family(PerceptionLM())
