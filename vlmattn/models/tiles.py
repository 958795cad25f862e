"""Families that cut an image into tiles: which runs of image tokens are one image, and where its tiles lie."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, tiled
from vlmattn.request import TEXT, number_images


class Tiled(Family):
    """Images of several runs. ``first`` is the text of the token that opens an image, ``last`` that of the token before
    its last tile; a family has one of them. Without a tokenizer every tile counts as an image. ``ahead``: the whole
    picture in small comes before its tiles, not behind them."""

    first: ClassVar[str] = ""
    last: ClassVar[str] = ""
    ahead: ClassVar[bool] = False

    @property
    def marker_ids(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(text for text in (self.first, self.last) if text)

    def numbers_of_runs(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        types: Tensor,
        marker_ids: Mapping[str, int] | None = None,
    ) -> Tensor:
        ids, known = inputs.get("input_ids"), self.known_marker_ids(model) | dict(marker_ids or {})
        runs = number_images(types, None)
        if ids is None or not known.keys() & {self.first, self.last}:
            if bool((runs > 0).any()):
                warnings.warn(
                    f"vlmattn: without a tokenizer every tile of a {model.config.model_type} image counts as an image"
                    " of its own; give the processor: wrap(model, ..., processor=processor)",
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

    def known_marker_ids(self, model: PreTrainedModel) -> dict[str, int]:
        """Marks whose ids the config knows."""
        return {}

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        runs = torch.tensor_split(slots, (slots.diff() > 1).nonzero()[:, 0] + 1)
        ids = inputs["input_ids"][0].tolist()
        gaps = [ids[int(one[-1]) + 1 : int(other[0])] for one, other in pairwise(runs)]
        ends = self.row_ends(model, gaps) if gaps else []
        rows = (len(runs) - 1) // (ends.index(True) + 1) if True in ends else None
        return tiled(len(slots), len(runs), rows, self.ahead)

    def row_ends(self, model: PreTrainedModel, gaps: Sequence[Sequence[int]]) -> list[bool]:
        """Which tiles of an image are the last of their row, by the ids of the tokens between one run and the next."""
        return []


def real_tiles(pixels: Tensor) -> tuple[slice, ...]:
    """The tiles ``[1, tiles, ...]`` of one sequence up to the last that is not all zeros, as padding is."""
    real = (pixels != 0).flatten(2).any(-1)[0].nonzero().flatten()
    return (slice(int(real[-1]) + 1 if len(real) else 0),)


class Matched(Family):
    """A family whose prompts do not say how many tiles are in a row: their likeness to the small picture does.

    ``ahead``: as for ``Tiled``.
    """

    ahead: ClassVar[bool] = False

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        own = tiles_of(self, model, inputs, slots)
        small, tiles = (own[:1], own[1:]) if self.ahead else (own[-1:], own[:-1])
        return tiled(len(slots), len(own), arranged(tiles, small) if len(tiles) else None, self.ahead)


def tiles_of(family: Family, model: PreTrainedModel, inputs: Mapping[str, Any], slots: Tensor) -> Tensor:
    """Pixels ``[tiles, channels, height, width]`` of the image in ``slots``; all tiles have as many tokens."""
    pixels: Tensor = inputs["pixel_values"].flatten(0, -4)
    visual = family.token_types(model, inputs["input_ids"])[0] != TEXT
    each = int(visual.sum()) // len(pixels)
    first = int(visual[: int(slots[0])].sum()) // each
    return pixels[first : first + len(slots) // each].float()


def arranged(tiles: Tensor, small: Tensor) -> int | None:
    """Rows of tiles that look most like the small picture ``[1, ...]``; None if others look nearly like it too."""
    found = []
    for rows in range(1, len(tiles) + 1):
        if len(tiles) % rows == 0:
            drawn, wanted = (adaptive_avg_pool2d(image, 48) for image in (joined(tiles, rows), small[0]))
            found.append((float((drawn - wanted).square().mean()), rows))
    (best, rows), *others = sorted(found)
    return rows if all(best < other / 2 for other, _ in others) else None


def joined(tiles: Tensor, rows: int) -> Tensor:
    """The picture ``[channels, height, width]`` that tiles in reading order are cut from."""
    return tiles.view(rows, -1, *tiles.shape[1:]).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
