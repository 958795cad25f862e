"""Apertus 1.5: images are tokens of a codebook, one for each cell of a grid of any size, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, whole
from vlmattn.models.inputs import encoded_lengths, largest_size
from vlmattn.models.registry import register_family


@register_family
class Apertus15(Family):
    """A token of text stands between rows, so an image is several runs."""

    model_types: ClassVar[Mapping[str, str]] = {"apertus1p5": "swiss-ai/Apertus-v1.5-8B"}

    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[list[int]] | None:
        """Rows and columns of each image."""
        sizes = inputs.get("image_sizes")
        return None if sizes is None else (sizes // model.config.vision_config.spatial_scale_factor).tolist()

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        grids = self.grids(model, inputs)
        return encoded_lengths(inputs) if grids is None else [rows * columns for rows, columns in grids]

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        grids = self.grids(model, inputs)
        return () if grids is None else whole(len(slots), *grids[image])

    def unpadded(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
        return largest_size(inputs, rows)
