"""Qwen2.5-Omni and Qwen3-Omni: the part that reads text, images, videos and sound, and writes text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.grids import Spatial
from vlmattn.models.registry import register_family


@register_family
class QwenOmni(Spatial):
    """Sound is text to the methods: its tokens are neither image nor video."""

    model_types: ClassVar[Mapping[str, str]] = {
        "qwen2_5_omni_thinker": "Qwen/Qwen2.5-Omni-7B",
        "qwen3_omni_moe_thinker": "Qwen/Qwen3-Omni-30B-A3B-Instruct",
    }

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        """Every sound has a marker before it."""
        sounds = (inputs["input_ids"] == model.config.audio_start_token_id).sum(1).tolist()
        heard = ("input_features", "feature_attention_mask", "audio_feature_lengths")
        return super().per_row(model, inputs) | {name: sounds for name in heard if isinstance(inputs.get(name), Tensor)}

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        return True

    def rope_index(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        heard = inputs.get("feature_attention_mask")
        lengths = inputs.get("audio_feature_lengths") if heard is None else heard.sum(-1)
        return model.get_rope_index(  # type: ignore[operator, no-any-return]
            inputs["input_ids"], inputs.get("image_grid_thw"), inputs.get("video_grid_thw"), inputs["attention_mask"],
            inputs.get("use_audio_in_video") or False, lengths, inputs.get("video_second_per_grid"),
        )[0]  # fmt: skip
