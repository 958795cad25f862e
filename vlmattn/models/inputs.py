"""Inputs of a forward: which belong to tokens and which to images, and how many rows of them each sequence has."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedModel

from vlmattn.errors import InputError

#: Inputs of forward() that say what kind each token is.
OF_TOKENS = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")

#: Inputs of forward() that say how to read all sequences.
OF_ALL = ("use_audio_in_video",)

#: Pictures among the inputs of forward().
OF_PIXELS = (
    "pixel_values",
    "pixel_values_images",
    "pixel_values_videos",
    "pixel_values_local",
    "high_res_pixel_values",
)

#: Inputs of forward() that belong to images.
OF_IMAGES = (
    *OF_PIXELS,
    "num_local_patches",
    "patches_grid",
    "pixel_attention_mask",
    "image_grid_thw",
    "image_grid_hw",
    "video_grid_thw",
    "second_per_grid_ts",
    "image_sizes",
    "image_sizes_videos",
    "batch_num_images",
    "spatial_shapes",
    "image_merge_sizes",
    "video_merge_sizes",
    "video_compression_mask",
    "target_sizes",
    "target_sizes_videos",
    "image_token_pooling",
    "image_grids",
    "image_num_crops",
    "video_token_pooling",
    "video_grids",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "cross_attention_mask",
    "image_position_ids",
    "video_position_ids",
)


def encoded_lengths(inputs: Mapping[str, Any]) -> list[int] | None:
    """Tokens of each image, where generate() encoded the images before the first forward."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    found = [encoded[kind].pooler_output for kind in ("image", "video") if encoded.get(kind) is not None]
    return [len(features) for features in found[0]] if len(found) == 1 and found[0] is not None else None


def even_lengths(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
    """Tokens of each image where all have as many; None where there are videos, or no pixels."""
    given = (inputs.get(name) for name in ("pixel_values", "pixel_values_images"))
    pixels, ids = next((found for found in given if found is not None), None), inputs.get("input_ids")
    if (found := encoded_lengths(inputs)) is not None or pixels is None or ids is None:
        return found
    if inputs.get("pixel_values_videos") is not None:
        return None
    return [int((ids == model.config.image_token_id).sum()) // len(pixels)] * len(pixels)


def largest_size(inputs: Mapping[str, Any], rows: slice) -> tuple[slice, ...]:
    """The part of ``rows`` of pixels, padded to one size, that the largest of their ``image_sizes`` takes."""
    sizes = inputs.get("image_sizes")
    if sizes is None or not len(sizes[rows]):
        return ()
    height, width = sizes[rows].amax(0).tolist()
    return (slice(None), slice(height), slice(width))


def for_rows(lengths: Sequence[int], tokens: Sequence[int]) -> list[int] | None:
    """Lengths in (row, token) order, repeated where generate() repeats every row for beams; None where they do not fit.

    Args:
        tokens: of each row that the lengths are of.
    """
    times, left = divmod(sum(tokens), max(sum(lengths), 1))
    if left or not times or len(tokens) % times:
        return None
    try:
        counts = share_out(tokens[::times], [(length, 1) for length in lengths])
    except InputError:
        return None
    starts = [sum(counts[:row]) for row in range(len(counts))]
    rows = [list(lengths[start : start + count]) for start, count in zip(starts, counts, strict=True)]
    return [length for row in rows for length in row * times]


def share_out(tokens: Sequence[int], items: Sequence[tuple[int, int]]) -> list[int]:
    """Pixel rows of each sequence, from its number of image tokens and (tokens, pixel rows) of each image in order.

    Raises:
        InputError: images that do not end where a sequence does.
    """
    counts, left = [], list(items)
    for wanted in tokens:
        rows = 0
        while wanted > 0 and left:
            size, pixels = left.pop(0)
            wanted, rows = wanted - size, rows + pixels
        counts.append(rows)
        if wanted:
            break
    if left or len(counts) < len(tokens) or wanted:
        raise InputError("the images do not fit the image tokens of the prompts; give each prompt the images it names")
    return counts


@cache
def warn_of_runs(model_type: str) -> None:
    """Once per process and model type."""
    warnings.warn(
        f"vlmattn: the family of {model_type} does not tell images (or tiles) side by side apart, so those in one run"
        " of image tokens count as one image; put text between images, or let the family say how long they are"
        " (docs/extend/family.md)",
        stacklevel=3,
    )


def about_images(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs about images, pixels aside."""
    return {name: inputs[name] for name in OF_IMAGES if name in inputs and not name.startswith("pixel")}
