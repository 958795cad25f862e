"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; videos whose frames are pooled, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.image_layout import Piece, square
from vlmattn.models.llava_next import LlavaNext
from vlmattn.models.registry import register_family


@register_family
class LlavaNextVideo(LlavaNext):
    """All frames of a video have as many tokens."""

    model_types: ClassVar[Mapping[str, str]] = {"llava_next_video": "llava-hf/LLaVA-NeXT-Video-7B-hf"}

    def frame_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any], runs: Sequence[int]) -> list[int]:
        vision = model.config.vision_config
        each = (vision.image_size // vision.patch_size // model.config.spatial_pool_stride) ** 2
        return [each] * (sum(runs) // each) if all(run % each == 0 for run in runs) else list(runs)

    def frame_layout(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], frame: int, slots: Tensor
    ) -> tuple[Piece, ...]:
        return square(len(slots))
