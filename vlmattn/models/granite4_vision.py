"""Granite 4 Vision: as LLaVA-NeXT, with fewer tokens, and features of several depths for several layers."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.image_layout import Piece
from vlmattn.models.llava_next import LlavaNext, features_of
from vlmattn.models.registry import register_family


@register_family
class Granite4Vision(LlavaNext):
    """Windows of patches become fewer tokens."""

    model_types: ClassVar[Mapping[str, str]] = {"granite4_vision": ""}
    refused: ClassVar[Mapping[str, str]] = {
        "pruning": "features of several depths are added to the rows of images in later layers; take an attention edit"
    }
    also_given: ClassVar[tuple[str, ...]] = ("vision_mask", "deepstack_features")

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is None:
            return super().image_lengths(model, inputs)
        return [len(image) for image in encoded.deepstack_features[0][1]]

    def packed(self, model: PreTrainedModel, sizes: Tensor, inputs: Mapping[str, Any]) -> list[Tensor]:
        kept = Fraction(model.config.downsample_rate) ** 2
        features = [tiles[:, : int(tiles.shape[1] * kept)] for tiles in features_of(model, sizes)]
        found: list[Tensor] = model.model.pack_image_features(  # type: ignore[union-attr, operator]
            features, sizes, vision_feature_select_strategy="full", image_newline=torch.ones(1)
        )
        return found

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        return ()
