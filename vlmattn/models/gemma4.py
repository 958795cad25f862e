"""Gemma 4: images of any form between <boi> and <eoi>; windows, shared keys and values, embeddings for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, whole
from vlmattn.models.inputs import share_out
from vlmattn.models.registry import register_family


@register_family
class Gemma4(Family):
    """Every frame of a video has a time before it and counts as an image. The last layers may reuse keys and values of
    others; edits see what a layer really attends with."""

    model_types: ClassVar[Mapping[str, str]] = {
        "gemma4": "google/gemma-4-e2b-it",
        "gemma4_unified": "google/gemma-4-12b-it",
    }
    markers: ClassVar[tuple[str, ...]] = ("boi_token_id", "eoi_token_id")
    leaves_rows_out: ClassVar[bool] = True
    causal: ClassVar[bool] = False  # where images are seen both ways, and for the windows
    also_given: ClassVar[tuple[str, ...]] = ("per_layer_inputs",)
    given_by_token: ClassVar[tuple[str, ...]] = also_given

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        found, frames = super().per_row(model, inputs), inputs.get("num_frames_per_video")
        if isinstance(frames, Tensor) and "pixel_values_videos" in found:
            found["num_frames_per_video"] = share_out(
                found["pixel_values_videos"], [(count, 1) for count in frames.tolist()]
            )
        return found

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        """Patches name their places ``(column, row)``, -1 for padding; squares of them become a token."""
        return _pooled(inputs.get("image_position_ids"), image, len(slots))

    def frame_layout(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], frame: int, slots: Tensor
    ) -> tuple[Piece, ...]:
        places = inputs.get("video_position_ids")
        return _pooled(None if places is None else places.flatten(0, -3), frame, len(slots))

    def logits(self, model: PreTrainedModel, hidden: Tensor, normed: bool = True) -> Tensor:
        found, cap = super().logits(model, hidden, normed), model.config.get_text_config().final_logit_softcapping
        return found if cap is None else cap * (found / cap).tanh()


def _pooled(places: Tensor | None, image: int, tokens: int) -> tuple[Piece, ...]:
    """The whole picture, whose patches lie at ``places [images, patches, 2]``, in ``tokens`` squares of them."""
    if places is None:
        return ()
    columns, rows = (places[image].amax(0) + 1).tolist()
    side = round((rows * columns / tokens) ** 0.5)
    return whole(tokens, rows // side, columns // side) if side else ()
