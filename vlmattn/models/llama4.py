"""Llama 4: tiles with separators between <|image_start|> and <|image_end|>; three of four layers see chunks of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from vlmattn.models.base import register_family
from vlmattn.models.tiles import Tiled


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

    def known_marks(self, model: PreTrainedModel) -> dict[str, int]:
        return {self.first: model.config.boi_token_index}


register_family(Llama4())
