"""LightOnOCR: pages of any size, without separators, a Pixtral tower whose patches are merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from vlmattn.models.mistral3 import Mistral3
from vlmattn.models.registry import register_family


@register_family
class LightOnOcr(Mistral3):
    """Rows have no token behind them."""

    model_types: ClassVar[Mapping[str, str]] = {"lighton_ocr": "lightonai/LightOnOCR-1B-1025"}

    def tower(self, model: PreTrainedModel) -> nn.Module | None:
        return None
