"""LLaVA-OneVision: as LLaVA-NeXT with more tiles, and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.image_layout import Piece, cells
from vlmattn.models.llava_next import LlavaNext, features_of
from vlmattn.models.registry import register_family


@register_family
class LlavaOnevision(LlavaNext):
    """An image among others in its prompt may be given without tiles (``batch_num_images``)."""

    model_types: ClassVar[Mapping[str, str]] = {"llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf"}

    def packed(self, model: PreTrainedModel, sizes: Tensor, inputs: Mapping[str, Any]) -> list[Tensor]:
        features = features_of(model, sizes)
        if (counts := inputs.get("batch_num_images")) is not None:
            tiled = [count == 1 for count in counts.tolist() for _ in range(count)]
            features = [found if whole else found[:1] for found, whole in zip(features, tiled, strict=True)]
        aspect = model.config.vision_aspect_ratio
        found: list[Tensor] = model.model.pack_image_features(  # type: ignore[union-attr, operator]
            features, sizes, image_newline=torch.ones(1), vision_aspect_ratio=aspect
        )[0]
        return found

    def frame_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any], runs: Sequence[int]) -> list[int]:
        """A newline token ends a video; it goes with the last frame."""
        vision = model.config.vision_config
        each = ceil(vision.image_size // vision.patch_size / 2) ** 2
        if any(run % each != 1 for run in runs):
            return list(runs)
        return [length for run in runs for length in (*[each] * (run // each - 1), each + 1)]

    def frame_layout(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], frame: int, slots: Tensor
    ) -> tuple[Piece, ...]:
        side = isqrt(len(slots))
        return (Piece(cells(side, side)),)
