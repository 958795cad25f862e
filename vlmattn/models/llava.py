"""LLaVA-1.5 in its Hugging Face form, with a CLIP, SigLIP or Pixtral tower and any language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.image_layout import Piece, whole
from vlmattn.models.inputs import encoded_lengths, largest_size
from vlmattn.models.registry import register_family
from vlmattn.models.towers import PatchTower


@register_family
class Llava(PatchTower):
    """No separators: adjacent images are told apart by their number of tokens, with a Pixtral tower by size."""

    model_types: ClassVar[Mapping[str, str]] = {"llava": "llava-hf/llava-1.5-7b-hf"}

    def patch(self, model: PreTrainedModel) -> int:
        """Pixels along a side of what becomes a token of a Pixtral tower."""
        return int(model.config.vision_config.patch_size)

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        pixels, sizes, side = inputs.get("pixel_values"), inputs.get("image_sizes"), self.patch(model)
        if (found := encoded_lengths(inputs)) is not None:
            return found
        if model.config.vision_config.model_type != "pixtral":
            return None if pixels is None else [model.config.image_seq_length] * len(pixels)
        return None if sizes is None else [(int(high) // side) * (int(wide) // side) for high, wide in sizes.tolist()]

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        if model.config.vision_config.model_type != "pixtral":
            return super().layout(model, inputs, image, slots)
        high, wide = inputs["image_sizes"][image].tolist()  # the token behind a row is no image token
        return whole(len(slots), high // self.patch(model), wide // self.patch(model))

    def unpadded(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
        return largest_size(inputs, rows)

    def feature_layers(self, model: PreTrainedModel) -> Sequence[int]:
        """Outputs of the tower's layers that are projected, side by side."""
        layers = model.config.vision_feature_layer
        return [layers] if isinstance(layers, int) else layers

    def patch_features(self, model: PreTrainedModel, output: Any) -> list[tuple[Tensor, Tensor | None]]:
        layers = self.feature_layers(model)
        hidden = torch.cat([output.hidden_states[layer] for layer in layers], -1)  # side by side
        if self.drops_cls(model):
            return [(image[1:], image[0]) for image in hidden]
        return [(image, None) for image in hidden]

    def project(self, model: PreTrainedModel, features: Tensor) -> Tensor:
        return model.model.multi_modal_projector(features)  # type: ignore[no-any-return, union-attr, operator]
