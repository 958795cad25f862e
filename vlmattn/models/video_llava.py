"""Video-LLaVA: images (``pixel_values_images``) and videos of eight frames, a tower for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, square
from vlmattn.models.registry import register_family


@register_family
class VideoLlava(Family):
    """Images have no separators; a video is one run."""

    model_types: ClassVar[Mapping[str, str]] = {"video_llava": "LanguageBind/Video-LLaVA-7B-hf"}
    square: ClassVar[bool] = True
    even: ClassVar[bool] = True

    def frame_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any], runs: Sequence[int]) -> list[int]:
        each = _patches(model) + 1
        return [each] * (sum(runs) // each) if all(run % each == 0 for run in runs) else list(runs)

    def frame_layout(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], frame: int, slots: Tensor
    ) -> tuple[Piece, ...]:
        """A CLS token comes first."""
        return square(len(slots), first=1)


def _patches(model: PreTrainedModel) -> int:
    vision = model.config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2
