"""Molmo 2: the picture in small, then in full, row by row; all image tokens of a prompt see each other both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, cells
from vlmattn.models.inputs import encoded_lengths, share_out
from vlmattn.models.registry import register_family


@register_family
class Molmo2(Family):
    """Frames of a video have the placeholders of images and count as images."""

    model_types: ClassVar[Mapping[str, str]] = {"molmo2": "allenai/Molmo2-8B"}
    markers: ClassVar[tuple[str, ...]] = (
        *("image_start_token_id", "low_res_image_start_token_id", "image_end_token_id"),
        *("frame_start_token_id", "frame_end_token_id"),
    )
    causal: ClassVar[bool] = False

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        found, films = encoded_lengths(inputs), inputs.get("video_grids")
        if films is not None:
            frames = {count * high * wide: (count, high * wide) for count, high, wide in films.tolist()}
            lengths = found or list(frames)
            return (
                [frames[n][1] for n in lengths for _ in range(frames[n][0])] if frames.keys() >= set(lengths) else None
            )
        grids = inputs.get("image_grids")
        return found if found is not None or grids is None else _sizes(grids)

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        if (films := inputs.get("video_grids")) is not None:
            _, high, wide = films.repeat_interleave(films[:, 0], 0)[image].tolist()
            return (Piece(cells(high, wide)),)
        low, beside, high, wide = inputs["image_grids"][image].tolist()
        return Piece(cells(low, beside)), Piece(cells(high, wide, low * beside))

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        tokens = (self.token_types(model, inputs["input_ids"]) != 0).sum(1).tolist()
        if inputs.get("pixel_values") is not None:
            sizes, crops = _sizes(inputs["image_grids"]), inputs["image_num_crops"].tolist()
            one = share_out(tokens, [(size, 1) for size in sizes])
            return {
                "pixel_values": share_out(tokens, list(zip(sizes, crops, strict=True))),
                "image_token_pooling": tokens,
                "image_grids": one,
                "image_num_crops": one,
            }
        if inputs.get("pixel_values_videos") is not None:
            films = share_out(
                tokens, [(count * high * wide, 1) for count, high, wide in inputs["video_grids"].tolist()]
            )
            return {"pixel_values_videos": films, "video_token_pooling": films, "video_grids": films}
        return {}


def _sizes(grids: Tensor) -> list[int]:
    """Tokens of each image: of the small picture and of the whole."""
    return (grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]).tolist()  # type: ignore[no-any-return]
