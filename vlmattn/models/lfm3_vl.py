"""LFM3-VL: images of any size between markers; most layers are short convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from vlmattn.models.grids import Gridded
from vlmattn.models.reasons import HYBRID
from vlmattn.models.registry import register_family


@register_family
class Lfm3VL(Gridded):
    """Edits act in the layers that have attention."""

    model_types: ClassVar[Mapping[str, str]] = {"lfm3_vl": "LiquidAI/LFM3-VL-2B"}
    refused: ClassVar[Mapping[str, str]] = HYBRID

    def norm(self, model: PreTrainedModel) -> nn.Module:
        return self.decoder(model).embedding_norm  # type: ignore[return-value]
