"""ERNIE 4.5 VL: images of any size between markers, experts for text and for images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.grids import Spatial
from vlmattn.models.registry import register_family
from vlmattn.request import IMAGE, VIDEO


@register_family
class Ernie45VL(Spatial):
    """Frames of a video are merged in pairs; markers go to the experts of what they are about."""

    model_types: ClassVar[Mapping[str, str]] = {"ernie4_5_vl_moe": "baidu/ERNIE-4.5-VL-28B-A3B-PT"}
    markers: ClassVar[tuple[str, ...]] = (
        "image_start_token_id",
        "image_end_token_id",
        "video_start_token_id",
        "video_end_token_id",
    )
    also_given: ClassVar[tuple[str, ...]] = ("moe_mm_token_type_ids",)
    given_by_token: ClassVar[tuple[str, ...]] = also_given

    def together(self, model: PreTrainedModel) -> int:
        return int(model.config.vision_config.temporal_merge_size)

    def retyped(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        found, name = super().retyped(model, inputs), "moe_mm_token_type_ids"
        if name in found:
            for marker in self.markers:
                kind = VIDEO if marker.startswith("video") else IMAGE
                found[name][inputs["input_ids"] == getattr(model.config, marker)] = kind
        return found
