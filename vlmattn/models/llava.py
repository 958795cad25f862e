"""LLaVA-1.5 in its Hugging Face form, with a CLIP, SigLIP or Pixtral tower and any language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.image_layout import Piece, whole
from vlmattn.models.inputs import encoded_lengths
from vlmattn.models.registry import register_family
from vlmattn.models.towers import PatchTower


def pixtral_lengths(model: PreTrainedModel, inputs: Mapping[str, Any], merge: int = 1) -> list[int] | None:
    """Image tokens of images of any size, whose rows have a token between them in the prompt."""
    sizes = inputs.get("image_sizes")
    if (found := encoded_lengths(inputs)) is not None or sizes is None:
        return found
    side = model.config.vision_config.patch_size * merge
    return [(int(height) // side) * (int(width) // side) for height, width in sizes.tolist()]


def pixtral_layout(
    model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor, merge: int = 1
) -> tuple[Piece, ...]:
    """The whole of an image of any size; the token behind a row is no image token."""
    side = model.config.vision_config.patch_size * merge
    high, wide = (length // side for length in inputs["image_sizes"][image].tolist())
    return whole(len(slots), high, wide)


def own_of_sizes(inputs: Mapping[str, Any], rows: slice) -> tuple[slice, ...]:
    """The part of images ``[n, channels, height, width]`` of several sizes that is not padding."""
    sizes = inputs.get("image_sizes")
    if sizes is None or not len(sizes[rows]):
        return ()
    height, width = sizes[rows].amax(0).tolist()
    return (slice(None), slice(height), slice(width))


@register_family
class Llava(PatchTower):
    """Images have no separators, and as many tokens each: adjacent ones are told apart by that number."""

    model_types: ClassVar[Mapping[str, str]] = {"llava": "llava-hf/llava-1.5-7b-hf"}

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        if model.config.vision_config.model_type == "pixtral":
            return pixtral_lengths(model, inputs)
        pixels = inputs.get("pixel_values")
        if (found := encoded_lengths(inputs)) is not None or pixels is None:
            return found
        return [model.config.image_seq_length] * len(pixels)

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        if model.config.vision_config.model_type == "pixtral":
            return pixtral_layout(model, inputs, image, slots)
        return super().layout(model, inputs, image, slots)

    def unpadded(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
        return own_of_sizes(inputs, rows)

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
