"""Families that cut an image into tiles with tokens between them: which runs of image tokens are one image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.request import TEXT, number_images


class Tiled(Family):
    """Images of several runs. ``first`` is the text of the token that opens an image, ``last`` that of the token before its
    last tile; a family has one of them. Without a tokenizer every tile counts as an image."""

    first: ClassVar[str] = ""
    last: ClassVar[str] = ""

    @property
    def marks(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(text for text in (self.first, self.last) if text)

    def image_numbers(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], types: Tensor, marks: Mapping[str, int] | None = None
    ) -> Tensor:
        ids, known = inputs.get("input_ids"), self.known_marks(model) | dict(marks or {})
        runs = number_images(types, None)
        if ids is None or not known.keys() & {self.first, self.last}:
            if bool((runs > 0).any()):
                warnings.warn(
                    f"vlmattn: without a tokenizer every tile of a {model.config.model_type} image counts as an image of its own; give"
                    " the processor: wrap(model, ..., processor=processor)",
                    stacklevel=2,
                )
            return runs
        visual = types != TEXT
        if self.first in known:
            number = (ids == known[self.first]).long().cumsum(1) - 1
        else:
            starts = visual & ~pad(visual, (1, 0))[:, :-1]
            last = starts & (pad(ids, (1, 0))[:, :-1] == known[self.last])  # the first token of a last tile
            slots = torch.arange(ids.shape[1], device=ids.device)
            begin = torch.where(starts, slots, 0).cummax(1).values  # of the run that a token lies in
            number = last.long().cumsum(1) - last.gather(1, begin).long()
        return torch.where(visual, number.clamp_min(0), -1).to(torch.int16)

    def known_marks(self, model: PreTrainedModel) -> dict[str, int]:
        """Marks whose ids the config knows."""
        return {}


def real_tiles(pixels: Tensor) -> tuple[slice, ...]:
    """The tiles ``[1, tiles, ...]`` of one sequence up to the last that is not all zeros, as padding is."""
    real = (pixels != 0).flatten(2).any(-1)[0].nonzero().flatten()
    return (slice(int(real[-1]) + 1 if len(real) else 0),)
