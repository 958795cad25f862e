"""Nemotron H Omni: images of any size; a layer is attention, a state space (Mamba 2), experts or an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, whole
from vlmattn.models.inputs import encoded_lengths, share_out
from vlmattn.models.reasons import HYBRID
from vlmattn.models.registry import register_family

_MERGED = 2  # patches along each side of what becomes a token


@register_family
class NemotronHOmni(Family):
    """Sound is text to the methods: its tokens are neither image nor video."""

    model_types: ClassVar[Mapping[str, str]] = {
        "nemotron_h_omni": "nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16",
    }
    refused: ClassVar[Mapping[str, str]] = HYBRID
    separated: ClassVar[bool] = True

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return model.language_model.model  # type: ignore[no-any-return, union-attr]

    def attention(self, layer: nn.Module) -> nn.Module | None:
        mixer: Any = layer.mixer
        return mixer if hasattr(mixer, "q_proj") else None

    def norm(self, model: PreTrainedModel) -> nn.Module:
        return self.decoder(model).norm_f  # type: ignore[return-value]

    def logits(self, model: PreTrainedModel, hidden: Tensor, normed: bool = True) -> Tensor:
        return model.language_model.lm_head(self.norm(model)(hidden) if normed else hidden)  # type: ignore[no-any-return, union-attr, operator]

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        found, grids = encoded_lengths(inputs), inputs.get("image_grid_hw")
        return found if found is not None or grids is None else (grids.prod(-1) // _MERGED**2).tolist()

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        if inputs.get("pixel_values") is None:
            return {}
        tokens = (self.token_types(model, inputs["input_ids"]) != 0).sum(1).tolist()
        patches = inputs["image_grid_hw"].prod(-1).tolist()
        return {
            "pixel_values": share_out(tokens, [(count // _MERGED**2, count) for count in patches]),
            "image_grid_hw": share_out(tokens, [(count // _MERGED**2, 1) for count in patches]),
        }

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        rows, columns = (side // _MERGED for side in inputs["image_grid_hw"][image].tolist())
        return whole(len(slots), rows, columns)
