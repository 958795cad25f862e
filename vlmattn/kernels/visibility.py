"""What the unedited model sees: the mask as transformers hands it over, and what is known about it on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Visibility:
    """Visible keys of the query rows of one attention call.

    Attributes:
        mask: bool or additive float ``[batch or 1, heads or 1, query, key]``. None means causal for several rows (row i
            sees keys 0..i, the way transformers drops a mask) and everything for one row.
        offset: cache slot of the first query row; None when not known on the host (compiled static cache).
        real: bool ``[batch, key]``, False for padding; None = no padding.
        plain: the mask is exactly causal and not padding (no window, nothing from the user).
    """

    mask: Tensor | None
    offset: int | None = 0
    real: Tensor | None = None
    plain: bool = True

    def rows(self, start: int, stop: int, query_length: int, keys: int, device: torch.device) -> Tensor | None:
        """The mask of the query rows ``start:stop`` in a form that broadcasts to ``[batch, heads, rows, keys]``."""
        if self.mask is not None:
            return self.mask[..., start:stop, :keys]
        if query_length == 1:
            return None
        return torch.arange(keys, device=device) <= torch.arange(start, stop, device=device)[:, None]
