"""Keys or values of a layer whose KV heads keep different slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmattn.errors import StateError
from vlmattn.kernels.visibility import hide


@dataclass(frozen=True, eq=False)
class SplitStates:
    """What a split cache layer gives to attention, for keys or for values.

    Attributes:
        full: ``[batch, full heads, slot, dim]``; near: ``[batch, near heads, place, dim]``.
        full_heads, near_heads: int64, which KV heads these are.
        valid: bool ``[batch, place]``, places that hold a token; None = all.
        count: float32 ``[batch]``, tokens that place 0 stands for (their mean; 0 = none); None = place 0 is a token.
    """

    full: Tensor
    near: Tensor
    full_heads: Tensor
    near_heads: Tensor
    valid: Tensor | None
    count: Tensor | None

    @property
    def kv_heads(self) -> int:
        return len(self.full_heads) + len(self.near_heads)

    @property
    def back(self) -> Tensor:
        """Places of the KV heads in order, after the full ones were put before the near ones."""
        return torch.cat([self.full_heads, self.near_heads]).argsort()

    def near_mask(self, queries: int, like: Tensor, additive: bool) -> Tensor | None:
        """Mask ``[batch, 1, query, place]`` of the newest ``queries`` rows, causal among them; None = all is seen."""
        if queries == 1 and self.valid is None and self.count is None:
            return None
        batch, _, places, _ = self.near.shape
        seen = torch.ones(batch, queries, places, dtype=torch.bool, device=self.near.device)
        if self.valid is not None:
            seen = seen & self.valid[:, None]
        seen = seen.tril(places - queries)[:, None]
        if self.count is None and not additive:
            return seen
        bias = torch.zeros(seen.shape, dtype=like.dtype, device=seen.device)
        if self.count is not None:  # softmax term count exp(q . mean)
            bias[..., 0] = self.count.clamp_min(1).log().to(like.dtype)[:, None, None]
        return hide(bias, ~seen)

    def __getattr__(self, name: str) -> Any:  # whoever takes this for a tensor
        if name.startswith("__"):
            raise AttributeError(name)
        raise StateError(
            "this cache keeps its heads apart, which only a wrapped model can read; start a new generate()"
        )
