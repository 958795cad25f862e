"""PaliGemma 1 and 2: the image and the question are a prefix that sees itself both ways; positions count from 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.registry import register_family
from vlmattn.models.towers import PatchTower


@register_family
class PaliGemma(PatchTower):
    """All tokens of a prompt have token type 0. Gemma 2 caps its scores and has windows in every second layer."""

    model_types: ClassVar[Mapping[str, str]] = {"paligemma": "google/paligemma2-3b-mix-448"}
    causal: ClassVar[bool] = False
    refused: ClassVar[Mapping[str, str]] = {"opening": "tokens of its prompts see each other both ways already"}

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        vision = model.config.vision_config
        visual = int((inputs["input_ids"] == model.config.image_token_id).sum()) if "input_ids" in inputs else 0
        length = (vision.image_size // vision.patch_size) ** 2
        return [length] * (visual // length) or None

    def retyped(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        name = "token_type_ids"
        return {name: inputs[name].new_zeros(inputs["input_ids"].shape)} if name in inputs else {}

    def positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        return super().positions(model, inputs) + 1

    def text_mask(self, real: Tensor) -> Tensor:
        return real[:, None, None].bool().expand(-1, 1, real.shape[1], -1)
