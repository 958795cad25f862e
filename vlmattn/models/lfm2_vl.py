"""LFM2-VL: tiles and a thumbnail between <|image_start|> and <|image_end|>; most layers are short convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from vlmattn.models.base import register_family
from vlmattn.models.tiles import Tiled


class Lfm2VL(Tiled):
    """Edits act in the layers that have attention."""

    model_types: ClassVar[Mapping[str, str]] = {"lfm2_vl": "LiquidAI/LFM2-VL-1.6B"}
    first: ClassVar[str] = "<|image_start|>"
    refused: ClassVar[Mapping[str, str]] = {
        "pruning": "its convolution layers mix neighbouring tokens, so none can be left out",
        "decoding": "its convolution layers keep a state that branches cannot share",
    }

    def norm(self, model: PreTrainedModel) -> nn.Module:
        return self.decoder(model).embedding_norm  # type: ignore[return-value]

    def tiles(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], tokens: int, count: int
    ) -> list[tuple[int, int]]:
        factor = model.config.downsample_factor
        return [(-(-height // factor) * -(-width // factor), 1) for height, width in inputs["spatial_shapes"].tolist()]


register_family(Lfm2VL())
