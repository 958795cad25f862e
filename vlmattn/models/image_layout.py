"""Where the tokens of an image lie in the picture: rectangles of it, cut into cells of one token each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a rectangle, in shares of the picture's width and height."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Piece:
    """A rectangle of an image, and the image tokens that show it.

    Attributes:
        tokens: int64 ``[rows, columns]`` on the CPU: for each cell, row by row from the top left, the number of its
            token among the tokens of the image.
        box: within 0..1. Where a processor padded the picture, cells beyond its edge are left out, and the box ends at
            the edge even if the last cells reach a bit (less than half a cell) over it.
    """

    tokens: Tensor
    box: Box = WHOLE

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"tokens": self.tokens.tolist(), "box": list(self.box)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Piece:
        """The piece that ``to_dict`` wrote."""
        left, top, right, bottom = data["box"]
        return cls(torch.tensor(data["tokens"], dtype=torch.long), (left, top, right, bottom))


def whole(tokens: int, rows: int, columns: int, first: int = 0, behind: int = 0) -> tuple[Piece, ...]:
    """A view of the whole picture, row by row from token ``first`` on; () if there are not as many as that takes.

    Args:
        tokens: of the image, in all; behind: tokens at the end of each row that show no place.
    """
    if first + rows * (columns + behind) != tokens:
        return ()
    return (Piece(cells(rows, columns, first, behind)),)


def square(tokens: int, first: int = 0) -> tuple[Piece, ...]:
    """As ``whole``, with as many rows as columns."""
    side = isqrt(tokens - first)
    return whole(tokens, side, side, first)


def by_grid(
    inputs: Mapping[str, Any], image: int, tokens: int, high: int, wide: int, behind: int = 0
) -> tuple[Piece, ...]:
    """As ``whole``, where ``image_grid_thw`` counts patches and ``high`` times ``wide`` of them become a token."""
    frames, height, width = inputs["image_grid_thw"][image].tolist()
    return whole(tokens, height // high, width // wide, behind=behind) if frames == 1 else ()


def tiled(tokens: int, count: int, rows: int | None, ahead: bool = False) -> tuple[Piece, ...]:
    """Square tiles in reading order, and the whole picture in small behind them; an image of one tile has nothing else.

    Args:
        tokens: of the image; count: tiles, the small picture included; rows: of tiles, None = not known, then only the
            small picture has a place. ahead: the small picture comes before the tiles.
    """
    each, tiles = tokens // count, count - 1
    side = isqrt(each)
    if side * side * count != tokens:
        return ()
    if not tiles:
        return square(tokens)
    small = Piece(cells(side, side, 0 if ahead else tiles * each))
    if rows is None:
        return (small,)
    found = parts(rows, tiles // rows, (side, side), each if ahead else 0)
    return (small, *found) if ahead else (*found, small)


def parts(rows: int, columns: int, side: tuple[int, int], first: int = 0) -> tuple[Piece, ...]:
    """Tiles of ``side`` (rows, columns) cells that cover the picture in reading order, from token ``first`` on."""
    return tuple(
        Piece(
            cells(*side, first + (row * columns + column) * side[0] * side[1]),
            (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows),
        )
        for row in range(rows)
        for column in range(columns)
    )


def cells(rows: int, columns: int, first: int = 0, behind: int = 0) -> Tensor:
    """Numbers of tokens ``[rows, columns]``, row by row from ``first``, with ``behind`` others after each row."""
    return first + torch.arange(rows)[:, None] * (columns + behind) + torch.arange(columns)


def in_square(height: int, width: int) -> Box:
    """The square around a picture that lies in its middle, in shares of the picture."""
    beside, above = ((max(height, width) / length - 1) / 2 for length in (width, height))
    return -beside, -above, 1 + beside, 1 + above


def inside(tokens: Tensor, box: Box) -> tuple[Piece, ...]:
    """A piece of cells ``[rows, columns]`` in a box that may reach out of the picture; () if no cell is in it."""
    left, top, right, bottom = box
    spans = []
    for count, low, high in ((tokens.shape[0], top, bottom), (tokens.shape[1], left, right)):
        size = (high - low) / count
        kept = [cell for cell in range(count) if 0 < low + (cell + 0.5) * size < 1]
        if not kept:
            return ()
        spans.append((kept[0], kept[-1] + 1, max(0.0, low + kept[0] * size), min(1.0, low + (kept[-1] + 1) * size)))
    (upper, lower, top, bottom), (first, last, left, right) = spans
    return (Piece(tokens[upper:lower, first:last], (left, top, right, bottom)),)
