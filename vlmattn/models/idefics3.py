"""Idefics3, SmolVLM, SmolVLM2: an image is tiles (<row_1_col_1> ...), then the whole behind <global-img>."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Tiled, real_tiles


@register_family
class Idefics3(Tiled):
    """Patches are shuffled into tokens, so the tower is not looked at. Frames of a video count as images."""

    model_types: ClassVar[Mapping[str, str]] = {
        "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
        "granite_docling": "ibm-granite/granite-for-docling-500m",
        "smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    }
    by_sequence: ClassVar[bool] = True
    last: ClassVar[str] = "<global-img>"

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return model.model.text_model  # type: ignore[no-any-return, union-attr]

    def row_ends(self, model: PreTrainedModel, gaps: Sequence[Sequence[int]]) -> list[bool]:
        return [len(gap) > 2 for gap in gaps]  # a line break besides <fake_token_around_image> and the name of a tile

    def unpadded(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
        return real_tiles(inputs[name][rows])
