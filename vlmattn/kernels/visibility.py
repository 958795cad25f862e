"""What the unedited model sees: the mask as transformers hands it over, and what is known about it on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mask:
    """The mask of some query rows, taken apart once: in a decode step it serves all layers.

    Attributes:
        visible, hidden: bool ``[batch or 1, heads or 1, query, key]``.
        bias: values of an additive mask, float32 and 0 where it hides; None = none.
        blind: bool ``[batch or 1, heads or 1, query, 1]``, rows that see nothing; None = there are none.
        reach: bool ``[query, key]``, keys that an edit may open; None = all.
    """

    visible: Tensor
    hidden: Tensor
    bias: Tensor | None
    blind: Tensor | None
    reach: Tensor | None = None

    @classmethod
    def of(cls, given: Tensor, reach: Tensor | None = None) -> Mask:
        """From a bool mask (True = visible) or an additive one."""
        additive = given.dtype != torch.bool
        visible = given > torch.finfo(given.dtype).min / 2 if additive else given
        hidden = ~visible
        blind: Tensor | None = hidden.all(-1, keepdim=True)
        if given.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(blind.any()):  # type: ignore[union-attr]
            blind = None  # a CPU is asked at no cost
        return cls(visible, hidden, given.float().masked_fill(hidden, 0.0) if additive else None, blind, reach)


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
    """

    mask: Tensor | None
    offset: int | None = 0
    real: Tensor | None = None
    plain: bool = True
    one_row: Mask | None = None
    window: int | None = None

    def rows(self, start: int, stop: int, query_length: int, keys: int, device: torch.device) -> Tensor | None:
        """The mask of the query rows ``start:stop`` in a form that broadcasts to ``[batch, heads, rows, keys]``."""
        if self.mask is not None:
            return self.mask[..., start:stop, :keys]
        if query_length == 1:
            return None
        return torch.arange(keys, device=device) <= torch.arange(start, stop, device=device)[:, None]

    def reach(self, start: int, stop: int, keys: int, device: torch.device) -> Tensor | None:
        """bool ``[rows, keys]``: keys within the window of the query rows ``start:stop``; None without a window."""
        if self.window is None:
            return None
        rows = torch.arange(start, stop, device=device)[:, None] + (self.offset or 0)
        return (rows - torch.arange(keys, device=device)).abs() < self.window
