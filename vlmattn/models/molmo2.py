"""Molmo 2: the picture in small, then in full, row by row; all image tokens of a prompt see each other both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
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
        films, grids = inputs.get("video_grids"), inputs.get("image_grids")
        if films is not None:
            return [high * wide for frames, high, wide in films.tolist() for _ in range(frames)]
        found = encoded_lengths(inputs)
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
            films = [(frames * high * wide, frames) for frames, high, wide in inputs["video_grids"].tolist()]
            return {
                "pixel_values_videos": share_out(tokens, films),
                "video_token_pooling": tokens,
                "video_grids": share_out(tokens, [(size, 1) for size, _ in films]),
            }
        return {}

    def by_itself(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Patches that are pooled are numbered from the first of the batch; the first of each image is pooled."""
        found = dict(inputs)
        for name in ("image_token_pooling", "video_token_pooling"):
            if (pooled := found.get(name)) is not None:  # -1: none
                found[name] = torch.where(pooled < 0, pooled, pooled - pooled[pooled >= 0].min())
        return found

    def retyped(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Markers, and what is between them, see each other as image tokens do."""
        ids, config = inputs["input_ids"], model.config
        first = (config.low_res_image_start_token_id, config.image_start_token_id, config.frame_start_token_id)
        opens, ends = (
            torch.isin(ids, torch.tensor(names, device=ids.device))
            for names in (first, (config.image_end_token_id, config.frame_end_token_id))
        )
        inside = opens.cumsum(1) > ends.cumsum(1) - ends.long()
        return {name: inside.to(inputs[name].dtype) for name in ("mm_token_type_ids",) if name in inputs}


def _sizes(grids: Tensor) -> list[int]:
    """Tokens of each image: of the small picture and of the whole."""
    return (grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]).tolist()  # type: ignore[no-any-return]
