"""PerceptionLM: an image in small and its tiles, all in one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel

from vlmattn.models.inputs import even_lengths
from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Matched


@register_family
class PerceptionLM(Matched):
    """Patches are pooled into tokens, so the tower (of timm) is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"perception_lm": "facebook/Perception-LM-8B"}
    ahead: ClassVar[bool] = True

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        """Pixels ``[images, tiles, ...]``: as many tiles each. Features that generate() made before are tile by tile."""
        tiled = inputs.get("pixel_values") is not None and inputs["pixel_values"].ndim == 5
        return even_lengths(model, inputs) if tiled and inputs.get("mm_encoder_outputs") is None else None

    def given_images(self, inputs: Mapping[str, Any]) -> int:
        return 0  # only tiles can be counted
