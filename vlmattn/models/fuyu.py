"""Fuyu: patches of an image go into the language model without a tower, row by row."""

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
    """A new line ends each row of patches. A prompt has one image."""

    model_types: ClassVar[Mapping[str, str]] = {"fuyu": "adept/fuyu-8b"}
    separated: ClassVar[bool] = True
    by_sequence: ClassVar[bool] = True

    def numbers_of_runs(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        types: Tensor,
        marker_ids: Mapping[str, int] | None = None,
    ) -> Tensor:
        return torch.where(types == TEXT, -1, 0).to(torch.int16)

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        rows = 1 + int((slots.diff() > 1).sum())
        return whole(len(slots), rows, len(slots) // rows)

    def norm(self, model: PreTrainedModel) -> nn.Module:
        return self.decoder(model).final_layernorm  # type: ignore[return-value]
