"""Llama 4: tiles with separators between <|image_start|> and <|image_end|>; most layers see chunks of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.models.image_layout import Piece, inside
from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Tiled, joined, tiles_of


@register_family
class Llama4(Tiled):
    """Layers without rotary positions see everything and scale their queries by position."""

    model_types: ClassVar[Mapping[str, str]] = {"llama4": "meta-llama/Llama-4-Scout-17B-16E-Instruct"}
    markers: ClassVar[tuple[str, ...]] = ("boi_token_index", "eoi_token_index")
    first: ClassVar[str] = "<|image_start|>"
    causal: ClassVar[bool] = False  # chunks, in prompts that are longer
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("opening", "pruning", "decoding"),
        "its layers see the prompt in chunks, whose borders tokens and edges must not cross",
    )

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return model.language_model.model  # type: ignore[no-any-return, union-attr]

    def known_marker_ids(self, model: PreTrainedModel) -> dict[str, int]:
        return {self.first: model.config.boi_token_index}

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        """The picture lies at the top left of its tiles, beside padding; a single tile is taken as it is."""
        found = super().layout(model, inputs, image, slots)
        if len(found) < 2:
            return found
        *tiles, small = found
        pixels = tiles_of(self, model, inputs, slots)
        high, wide = filled(joined(pixels[:-1], round(1 / tiles[0].box[3])), pixels[-1])
        boxes = (
            (left / wide, top / high, right / wide, bottom / high)
            for left, top, right, bottom in (t.box for t in tiles)
        )
        return (*(piece for tile, box in zip(tiles, boxes, strict=True) for piece in inside(tile.tokens, box)), small)

    def row_ends(self, model: PreTrainedModel, gaps: Sequence[Sequence[int]]) -> list[bool]:
        return [gap[0] == gaps[-1][0] for gap in gaps]  # <|tile_y_separator|>, which is behind the last tile too


def filled(canvas: Tensor, small: Tensor) -> tuple[float, float]:
    """Shares of height and width of a canvas ``[channels, height, width]`` that ``small``, the picture alone, fills.

    Both are read up to the last row and column that do not have the colour of the canvas's corner, so borders that the
    picture has in that colour itself cancel out.
    """
    shares = []
    for axis in (1, 0):
        ends = []
        for pixels in (canvas, small):
            other = ((pixels - canvas[:, -1:, -1:]).abs() > 0.02).any(0).any(axis).nonzero()
            ends.append((int(other[-1]) + 1) / pixels.shape[2 - axis] if len(other) else 1.0)
        shares.append(min(1.0, ends[0] / ends[1]))
    return shares[0], shares[1]
