"""LFM2-VL: tiles and a thumbnail between <|image_start|> and <|image_end|>; most layers are short convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.models.image_layout import Piece, cells, parts, whole
from vlmattn.models.reasons import HYBRID
from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Tiled


@register_family
class Lfm2VL(Tiled):
    """Edits act in the layers that have attention."""

    model_types: ClassVar[Mapping[str, str]] = {"lfm2_vl": "LiquidAI/LFM2-VL-1.6B"}
    first: ClassVar[str] = "<|image_start|>"
    refused: ClassVar[Mapping[str, str]] = HYBRID

    def norm(self, model: PreTrainedModel) -> nn.Module:
        return self.decoder(model).embedding_norm  # type: ignore[return-value]

    def tiles(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], tokens: int, count: int
    ) -> list[tuple[int, int]]:
        return [(high * wide, 1) for high, wide in cells_of(model, inputs)]

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        """Tiles are square; the small picture has the form of the whole, which tells how many are in a row."""
        before = int((inputs["input_ids"][0, : int(slots[0])] == model.config.image_token_id).sum())
        sizes, count = [], 0
        for high, wide in cells_of(model, inputs):
            if before <= count < before + len(slots):
                sizes.append((high, wide))
            count += high * wide
        *tiles, small = sizes
        if not tiles:
            return whole(len(slots), *small)
        shapes = [(rows, len(tiles) // rows) for rows in range(1, len(tiles) + 1) if len(tiles) % rows == 0]
        rows, columns = min(shapes, key=lambda shape: abs(shape[1] / shape[0] - small[1] / small[0]))
        if small == tiles[0] and rows != columns:
            return ()  # nothing but tiles
        first = len(tiles) * tiles[0][0] * tiles[0][1]
        return (*parts(rows, columns, tiles[0]), Piece(cells(*small, first)))


def cells_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of the tokens of each tile."""
    factor = model.config.downsample_factor
    return [(-(-height // factor), -(-width // factor)) for height, width in inputs["spatial_shapes"].tolist()]
