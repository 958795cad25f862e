"""Fuyu: patches of an image are projected straight into the decoder, row after row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, whole
from vlmattn.models.registry import register_family
from vlmattn.request import TEXT


@register_family
class Fuyu(Family):
    """A prompt has one image, in which a newline token ends each row of patches."""

    model_types: ClassVar[Mapping[str, str]] = {"fuyu": "adept/fuyu-8b"}
    by_sequence: ClassVar[bool] = True

    def norm(self, model: PreTrainedModel) -> nn.Module:
        return self.decoder(model).final_layernorm  # type: ignore[return-value]

    def image_numbers(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        types: Tensor,
        marker_ids: Mapping[str, int] | None = None,
    ) -> Tensor:
        return torch.where(types != TEXT, 0, -1).to(torch.int16)

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        rows = int((slots.diff() > 1).sum()) + 1
        return whole(len(slots), rows, len(slots) // rows)
