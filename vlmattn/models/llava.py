"""LLaVA-1.5 in its Hugging Face form, with a CLIP or SigLIP tower and any language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel

from vlmattn.errors import UnsupportedError
from vlmattn.models.base import Family, register_family

_TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(Family):
    """Every image has the same number of tokens and no separators: adjacent images are told apart by that number."""

    model_types: ClassVar[Mapping[str, str]] = {"llava": "llava-hf/llava-1.5-7b-hf"}

    def check(self, model: PreTrainedModel) -> None:
        tower = model.config.vision_config.model_type
        if tower not in _TOWERS:
            raise UnsupportedError(
                f"LLaVA with a '{tower}' tower is not supported yet; supported towers: {', '.join(_TOWERS)}"
            )

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        encoded = inputs.get("mm_encoder_outputs") or {}
        if (images := encoded.get("image")) is not None:  # generate() encodes the images before the first forward
            return [len(features) for features in images.pooler_output]
        pixels = inputs.get("pixel_values")
        return None if pixels is None else [model.config.image_seq_length] * len(pixels)


register_family(Llava())
