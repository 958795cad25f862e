"""DeepSeek-OCR 2 and Unlimited-OCR: parts of a page, then the page in small and a separator, in one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, cells
from vlmattn.models.inputs import encoded_lengths, even_lengths
from vlmattn.models.registry import register_family


@register_family
class DeepseekOcr2(Family):
    """Tokens are what queries found in the page, so they show no places."""

    model_types: ClassVar[Mapping[str, str]] = {"deepseek_ocr2": "deepseek-community/DeepSeek-OCR-2"}

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        found = encoded_lengths(inputs)
        return even_lengths(model, inputs) if found is None and inputs.get("pixel_values_local") is None else found

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        if inputs.get("pixel_values") is None:
            return {}
        images = self.rows_of(model, inputs, len(inputs["pixel_values"]))
        found = {"pixel_values": images}
        if inputs.get("num_local_patches") is not None:
            parts = [int(count) for count in inputs["num_local_patches"]]
            starts = [sum(images[:row]) for row in range(len(images))]
            found["pixel_values_local"] = [
                sum(parts[start : start + count]) for start, count in zip(starts, images, strict=True)
            ]
            found |= {name: images for name in ("num_local_patches", "patches_grid") if inputs.get(name) is not None}
        return found


@register_family
class UnlimitedOcr(DeepseekOcr2):
    """A token ends each row. Layers see the prompt whole, and of the answer its newest tokens."""

    model_types: ClassVar[Mapping[str, str]] = {"unlimited_ocr": "baidu/Unlimited-OCR"}
    causal: ClassVar[bool] = False
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("pruning", "decoding"),
        "its cache drops the oldest tokens of the answer by a rule of its own, which knows no branches and no gaps;"
        " take an attention edit",
    )

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        """A page without parts; where its parts lie is not told by the tokens."""
        side = int((len(slots) - 1 + 0.25) ** 0.5)
        return (Piece(cells(side, side, behind=1)),) if side * (side + 1) + 1 == len(slots) else ()
