"""What the unedited model sees: the mask as transformers hands it over, and what is known about it on the host.

Masks have two forms, bool (True = visible) and additive floats. ``visible`` and ``additive`` turn one into the other;
nobody else does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def visible(mask: Tensor) -> Tensor:
    """What a mask of either form shows, as bool in its shape."""
    return mask if mask.dtype == torch.bool else mask > floor_of(mask.dtype)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask to add to scores for a bool one: 0 where visible, the lowest number of ``dtype`` elsewhere."""
    return hide(torch.zeros(visible.shape, dtype=dtype, device=visible.device), ~visible)


def hide(given: Tensor, hidden: Tensor) -> Tensor:
    """Scores, or a mask of either form, in which nothing of ``hidden`` (bool, broadcasts) is visible."""
    return given.masked_fill(hidden, torch.finfo(given.dtype).min if given.is_floating_point() else 0)


def floor_of(dtype: torch.dtype) -> float:
    """Values of an additive mask up to this hide."""
    return torch.finfo(dtype).min / 2


@dataclass(frozen=True, eq=False)
class Mask:
    """The mask of some query rows, taken apart once: in a decode step it serves all layers.

    Attributes:
        visible, hidden: bool ``[batch or 1, heads or 1, query, key]``.
        bias: values of an additive mask, float32 and 0 where it hides; None = none.
        blind: bool ``[batch or 1, heads or 1, query, 1]``, rows that see nothing; None = there are none.
        reach: bool ``[batch or 1, 1, query, key]``, keys that an edit may open; None = all.
    """

    visible: Tensor
    hidden: Tensor
    bias: Tensor | None
    blind: Tensor | None
    reach: Tensor | None = None

    @classmethod
    def of(cls, given: Tensor, reach: Tensor | None = None) -> Mask:
        """From a mask of either form."""
        shown = visible(given)
        hidden = ~shown
        nothing = hidden.all(-1, keepdim=True)
        # a CPU is asked at no cost
        asked = given.device.type == "cpu" and not torch.compiler.is_compiling()
        blind = None if asked and not bool(nothing.any()) else nothing
        bias = None if given.dtype == torch.bool else given.float().masked_fill(hidden, 0.0)
        return cls(shown, hidden, bias, blind, reach)


@dataclass(frozen=True, eq=False)
class Visibility:
    """Visible keys of the query rows of one attention call.

    Attributes:
        mask: bool or additive float ``[batch or 1, heads or 1, query, key]``. None means causal for several rows (row i
            sees keys 0..i, the way transformers drops a mask) and everything for one row.
        offset: cache slot of the first query row; None when not known on the host (compiled static cache).
        real: bool ``[batch, key]``, False for padding; None = no padding.
        plain: the mask is exactly causal and not padding (no window, nothing from the user).
        one_row: the mask of a single query row, taken apart.
        window: keys that far from a row, or further, stay invisible whatever an edit opens; None = no window.
        places: int64 ``[batch, key]``, where keys are, for windows; None = side by side.
    """

    mask: Tensor | None
    offset: int | None = 0
    real: Tensor | None = None
    plain: bool = True
    one_row: Mask | None = None
    window: int | None = None
    places: Tensor | None = None

    def of_rows(self, start: int, stop: int, keys: int, device: torch.device) -> Mask:
        """The mask of the query rows ``start:stop`` of several."""
        if self.mask is not None:
            given = self.mask[..., start:stop, :keys]
        else:
            given = (torch.arange(keys, device=device) <= torch.arange(start, stop, device=device)[:, None])[None, None]
        if self.window is None:
            return Mask.of(given)
        first = self.offset or 0
        places = torch.arange(keys, device=device)[None] if self.places is None else self.places
        rows = places[:, None, first + start : first + stop, None]
        return Mask.of(given, (rows - places[:, None, None]).abs() < self.window)
