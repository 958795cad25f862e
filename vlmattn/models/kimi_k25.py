"""Kimi K2.5: images of any size, a DeepSeek V3 language model with latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.grids import rows_by_grid
from vlmattn.models.image_layout import Piece, by_grid, whole
from vlmattn.models.registry import register_family


@register_family
class KimiK25(Family):
    """Keys are longer than values; positions are counted in one dimension."""

    model_types: ClassVar[Mapping[str, str]] = {"kimi_k25": "moonshotai/Kimi-K2.5"}
    markers: ClassVar[tuple[str, ...]] = ("vision_start_token_id", "vision_end_token_id")

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        """The last row and column may be padding in part."""
        high, wide = model.config.vision_config.merge_kernel_size
        return by_grid(inputs, image, len(slots), high, wide)

    def frame_layout(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], frame: int, slots: Tensor
    ) -> tuple[Piece, ...]:
        """Frames that are read together are merged into one."""
        high, wide = model.config.vision_config.merge_kernel_size
        _, height, width = inputs["video_grid_thw"][frame].tolist()
        return whole(len(slots), height // high, width // wide)

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        high, wide = model.config.vision_config.merge_kernel_size
        types = self.token_types(model, inputs["input_ids"])
        return rows_by_grid(types, inputs, lambda _, height, width: height * width // (high * wide))
