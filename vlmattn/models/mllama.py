"""Llama 3.2 Vision: images are read by cross-attention layers, between layers of self-attention over the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family

_WHY = "its image tokens are not in the decoder's sequence but in cross-attention layers of their own"
_DROPPING = (
    f"{_WHY}, whose keys a branch without the image would lack; use a rule that changes the image instead, like vcd"
)
_LOOKING = (
    f"{_WHY}, so attention to them cannot guide a decoding rule; use one that does not look at attention, like vcd"
)


@register_family
class Mllama(Family):
    """A prompt has one placeholder for each image."""

    model_types: ClassVar[Mapping[str, str]] = {"mllama": "meta-llama/Llama-3.2-11B-Vision-Instruct"}
    by_sequence: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("edits", "masks", "pruning"), _WHY),
        "looking": _LOOKING,
        "dropping": _DROPPING,
    }

    def refuses(self, model: PreTrainedModel) -> dict[str, str]:
        return dict(self.refused)

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        ids = inputs.get("input_ids")
        return None if ids is None else [1] * int((ids == model.config.image_token_id).sum())

    def unpadded(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
        return (slice(int((inputs["aspect_ratio_ids"][rows] > 0).sum())),)
