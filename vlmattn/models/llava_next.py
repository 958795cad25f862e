"""LLaVA-NeXT (1.6): a small image and unpadded tiles of a large one, a newline token after each row of patches."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from vlmattn.errors import InputError
from vlmattn.models.image_layout import Box, Piece, cells, in_square, inside
from vlmattn.models.inputs import encoded_lengths
from vlmattn.models.registry import register_family
from vlmattn.models.towers import PatchTower


@register_family
class LlavaNext(PatchTower):
    """All tokens of an image lie in one run, without separators: adjacent images are told apart by their sizes."""

    model_types: ClassVar[Mapping[str, str]] = {"llava_next": "llava-hf/llava-v1.6-mistral-7b-hf"}

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        found, sizes = encoded_lengths(inputs), inputs.get("image_sizes")
        if found is not None or sizes is None or inputs.get("pixel_values") is None:
            return found
        return list(map(len, self.packed(model, sizes, inputs)))

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        """A view of the whole picture, then all tiles as one grid without their padding, with a newline behind each
        row; an image without tiles (LLaVA-OneVision) lies in the middle of a square."""
        config, size = model.config, inputs["image_sizes"][image].tolist()
        side = config.vision_config.image_size // config.vision_config.patch_size
        newlines = self.packed(model, inputs["image_sizes"], inputs)[image][side * side :, 0].nonzero()[:, 0]
        rows, columns = len(newlines), int(newlines[0])
        if side * side + rows * (columns + 1) != len(slots):
            return ()
        if not columns:
            return inside(cells(side, side), in_square(*size))
        box = unpadded(size, config.image_grid_pinpoints, config.vision_config.image_size, side)
        return (Piece(cells(side, side)), *inside(cells(rows, columns, side * side, behind=1), box))

    def unpadded(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
        sizes = inputs.get("image_sizes")
        if sizes is None or name != "pixel_values" or not len(sizes[rows]):
            return ()
        return (slice(max(map(len, features_of(model, sizes[rows])))),)

    def tower(self, model: PreTrainedModel) -> nn.Module | None:
        """Of this family only: those that are made like it pack other towers' tokens, or pool them."""
        return super().tower(model) if model.config.model_type == "llava_next" else None

    def summary_attention(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        seen = torch.stack(super().summary_attention(model, module, hidden, inputs))
        return [image.T for image in self._by_image(model, seen.transpose(1, 2), inputs, 0.0)]

    def patch_keys(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        return self._by_image(model, torch.stack(super().patch_keys(model, module, hidden, inputs)), inputs, 0.0)

    def tile_numbers(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Tensor]:
        if inputs.get("image_sizes") is None:
            return []
        found = []
        for features in features_of(model, inputs["image_sizes"]):
            found.append(torch.arange(len(features)).view(-1, 1, 1).expand(features.shape).float())
        packed = self._by_image(model, torch.cat(found), inputs, -1.0) if found else []
        return [image[:, 0].long() for image in packed]

    def _by_image(
        self, model: PreTrainedModel, values: Tensor, inputs: Mapping[str, Any], newline: float
    ) -> list[Tensor]:
        """Values ``[tiles, patches, width]`` of all images at the tokens of each, ``[tokens, width]``."""
        sizes = inputs.get("image_sizes")
        counts = [] if sizes is None else list(map(len, features_of(model, sizes)))
        if sum(counts) != len(values):
            raise InputError(
                f"the vision tower saw {len(values)} tiles and image_sizes tell of {sum(counts)}; give pixel_values and"
                " image_sizes as the processor makes them"
            )
        found: list[Tensor] = model.model.pack_image_features(  # type: ignore[union-attr, operator]
            list(torch.split(values, counts)),
            sizes,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            image_newline=torch.full((values.shape[-1],), newline, device=values.device),
        )[0]
        return found

    def packed(self, model: PreTrainedModel, sizes: Tensor, inputs: Mapping[str, Any]) -> list[Tensor]:
        """``[tokens, 1]`` for images of these sizes, by the model's own packing: 0 for features, 1 for newlines."""
        found: list[Tensor] = model.model.pack_image_features(  # type: ignore[union-attr, operator]
            features_of(model, sizes), sizes, vision_feature_select_strategy="full", image_newline=torch.ones(1)
        )[0]
        return found


def features_of(model: PreTrainedModel, sizes: Tensor) -> list[Tensor]:
    """Features ``[tiles, patches, 1]`` of zeros, of images ``[n, 2]`` (height, width)."""
    config = model.config
    side, patches = (
        config.vision_config.image_size,
        (config.vision_config.image_size // config.vision_config.patch_size) ** 2,
    )
    tiles = [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes.tolist()]
    return [torch.zeros(count, patches, 1) for count in tiles]


def unpadded(size: list[int], pinpoints: list[list[int]], tile: int, side: int) -> Box:
    """The rectangle of a picture of ``size`` (height, width) that is left of its tiles, of ``side`` times ``side``
    patches, when rows and columns of padding are cut off; it reaches out of the picture where some of the padding
    stays.

    Args:
        tile: its height and width in pixels.
    """
    shape = get_anyres_image_grid_shape(size, pinpoints, tile)
    scale = min(count * tile / length for count, length in zip(shape, size, strict=True))
    places = torch.stack(torch.meshgrid(*(torch.arange(count * side) for count in shape), indexing="ij"))
    kept = unpad_image(places, size)
    spans = []
    for axis, (count, length) in enumerate(zip(shape, size, strict=True)):
        shown = min(ceil(length * scale), count * tile)
        before = (count * tile - shown) // 2  # pixels of padding, and as many behind
        first, last = (int(kept[axis].flatten()[end]) for end in (0, -1))
        spans.append([(edge * tile / side - before) / shown for edge in (first, last + 1)])
    (top, bottom), (left, right) = spans
    return left, top, right, bottom
