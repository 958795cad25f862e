"""HunyuanOCR: pages of any size with a token behind each row, positions in four dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.grids import Spatial
from vlmattn.models.image_layout import Piece, cells
from vlmattn.models.inputs import share_out
from vlmattn.models.registry import register_family


@register_family
class HunYuanVL(Spatial):
    """A token stands before the first row of an image and one behind the last."""

    model_types: ClassVar[Mapping[str, str]] = {"hunyuan_vl": "tencent/HunyuanOCR"}
    markers: ClassVar[tuple[str, ...]] = ("im_start_id", "im_end_id")

    text_axis: ClassVar[bool] = False

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        if inputs.get("pixel_values") is None:
            return {}
        tokens = (self.token_types(model, inputs["input_ids"]) != 0).sum(1).tolist()
        grids, merge = inputs["image_grid_thw"].tolist(), self.merge(model)
        sizes = [(high // merge) * (wide // merge + 1) + 2 for _, high, wide in grids]
        patches = [high * wide for _, high, wide in grids]
        return {
            "pixel_values": share_out(tokens, list(zip(sizes, patches, strict=True))),
            "image_grid_thw": share_out(tokens, [(size, 1) for size in sizes]),
        }

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        merge = self.merge(model)
        rows, columns = (side // merge for side in inputs["image_grid_thw"][image, 1:].tolist())
        return (Piece(cells(rows, columns, first=1, behind=1)),) if rows * (columns + 1) + 2 == len(slots) else ()
