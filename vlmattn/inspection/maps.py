"""Where a prompt looks: attention of its last row, which predicts the answer, over the image tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.inspection.measuring import ImageMeasure, Inputs, Measure, attention_of, prepared_one
from vlmattn.models import Box, find_family, marker_ids_of
from vlmattn.request import LayerContext, Weights


def image_attention(model: PreTrainedModel, processor: Any, inputs: Inputs) -> list[tuple[tuple[Box, Tensor], ...]]:
    """Attention of the last prompt row on each image, by the bare model.

        map[y, x] = mean over layers and heads of a_j,   j the image token at (y, x), a the last prompt row's attention

    Where images are read by cross-attention (Llama 3.2 Vision) the layers are those of cross-attention.

    Args:
        inputs: what the processor made of one prompt, without padding.

    Returns:
        For each image its pieces (``vlmattn.models.Piece``) with their maps ``[rows, columns]``, float32 on the CPU:
        tiles, and views of the whole picture. Nothing for an image whose tokens have no known place.

    Raises:
        InputError: several prompts, or padding.
        UnsupportedError: a family or an attention implementation that is not supported.
    """
    family, given = find_family(model), prepared_one(model, inputs)
    if family.anatomy(model).cross:
        return _of_cross_attention(model, given)
    types = family.types_of_call(model, given)
    marker_ids = marker_ids_of(family, processor)
    numbers = family.image_numbers(model, given, types, marker_ids)[0].cpu()
    row = last_row(model, given)
    found = []
    for image in range(int(numbers.max()) + 1):
        own = row[numbers == image]
        pieces = family.image_layout(model, given, image, len(own), marker_ids)
        found.append(tuple((piece.box, own[piece.tokens]) for piece in pieces))
    return found


def _of_cross_attention(model: PreTrainedModel, given: Inputs) -> list[tuple[tuple[Box, Tensor], ...]]:
    """As ``image_attention``, from the keys of layers of cross-attention."""
    family, row = find_family(model), last_row(model, given, ImageMeasure)
    own = torch.split(row, family.image_keys(model))
    pieces = [family.key_layout(model, given, image) for image in range(len(own))]
    return [tuple((piece.box, keys[piece.tokens]) for piece in found) for keys, found in zip(own, pieces, strict=True)]


def last_row(model: PreTrainedModel, inputs: Inputs, measuring: type[Measure] = Measure) -> Tensor:
    """The bare model's attention ``[keys]`` of a prompt's last row, mean over layers and heads, on the cpu."""

    def mean(context: LayerContext, weights: Weights) -> Tensor:
        return weights(context.queries - 1, context.queries)[0, :, 0].mean(0).float().cpu()

    positions = find_family(model).positions(model, inputs)  # given, so that the model notes none
    with torch.inference_mode():
        rows = attention_of(model, {**inputs, "position_ids": positions}, mean, measuring)
    return torch.stack(list(rows.values())).mean(0)
