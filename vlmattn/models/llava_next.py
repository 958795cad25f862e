"""LLaVA-NeXT (1.6): a small image and tiles of a large one, unpadded, with a newline token after each row of patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vlmattn.models.base import Family, encoded_lengths, register_family


class LlavaNext(Family):
    """All tokens of an image lie in one run, without separators: adjacent images are told apart by their sizes."""

    model_types: ClassVar[Mapping[str, str]] = {"llava_next": "llava-hf/llava-v1.6-mistral-7b-hf"}

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        found, sizes = encoded_lengths(inputs), inputs.get("image_sizes")
        if found is not None or sizes is None or inputs.get("pixel_values") is None:
            return found
        return self.packed(model, sizes, inputs)

    def own(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
        sizes = inputs.get("image_sizes")
        if sizes is None or name != "pixel_values" or not len(sizes[rows]):
            return ()
        return (slice(max(map(len, features_of(model, sizes[rows])))),)

    def packed(self, model: PreTrainedModel, sizes: Tensor, inputs: Mapping[str, Any]) -> list[int]:
        """Tokens of images of these sizes, by the model's own packing of features of width 1."""
        lengths = model.model.pack_image_features(  # type: ignore[union-attr, operator]
            features_of(model, sizes), sizes, vision_feature_select_strategy="full", image_newline=torch.empty(1)
        )[1]
        return lengths.tolist()  # type: ignore[no-any-return]


def features_of(model: PreTrainedModel, sizes: Tensor) -> list[Tensor]:
    """Empty features ``[tiles, patches, 1]`` of images ``[n, 2]`` (height, width)."""
    config = model.config
    side, patches = (
        config.vision_config.image_size,
        (config.vision_config.image_size // config.vision_config.patch_size) ** 2,
    )
    tiles = [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes.tolist()]
    return [torch.empty(count, patches, 1) for count in tiles]


register_family(LlavaNext())
