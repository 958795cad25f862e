"""What methods that drop tokens see and say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.request.callbacks import Weights
from vlmattn.request.request import Request
from vlmattn.request.token_map import compacted


@dataclass(frozen=True, eq=False)
class PruningStage:
    """The rows of a prompt that enter a layer, for a method that chooses which of them go on.

    Attributes:
        request: as the layer before had it; layer: the layer that only the chosen rows reach.
        hidden: ``[batch, rows, hidden]``, the residual stream that enters it.
        visual: bool ``[batch, rows]``, image tokens. ``text``: other tokens of the prompt. ``images``: int16, number of
            the image within its row, -1 for text.
        counts: image tokens among the rows of each sequence; ``given``: tokens of each image that it had.
        weights: unedited attention that the layer would pay, see ``Weights``; rows count from the first of these.
        start: slot of the first row among the keys of ``weights``.
        tables: cosines and sines of the rows' positions in the last layer with attention, ``[batch or 1, rows, dim]``;
            None where positions are not rotated, and before the first such layer.
    """

    request: Request
    layer: int
    hidden: Tensor
    visual: Tensor
    text: Tensor
    images: Tensor
    counts: tuple[int, ...]
    given: tuple[tuple[int, ...], ...]
    weights: Weights
    start: int
    tables: tuple[Tensor, Tensor] | None

    def top(self, scores: Tensor, counts: Sequence[int]) -> Tensor:
        """The ``counts`` image tokens of each sequence with the highest scores ``[batch, rows]``: bool, as they are."""
        order = scores.float().masked_fill(~self.visual, float("-inf")).argsort(dim=1, descending=True, stable=True)
        wanted = torch.tensor(counts, device=scores.device)[:, None]
        return (order.argsort(dim=1) < wanted) & self.visual


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """Rows that go on: ``visual`` bool ``[batch, rows]`` of the image tokens, ``counts`` of them in each sequence.

    ``hidden`` ``[batch, rows, hidden]`` replaces the residual stream, for methods that merge tokens.
    """

    visual: Tensor
    counts: tuple[int, ...]
    hidden: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Eviction:
    """Slots of a layer's cache that stay, ``keep`` bool ``[batch, keys]``: ``counts`` real ones in each sequence.

    ``keep`` ``[batch, kv_heads, keys]``: each KV head keeps others, as many as the others do. ``joined``: the slot that
    each one is merged into, int64 ``[batch, kv_heads, keys]`` (those that stay: themselves), and how much of it is.
    """

    keep: Tensor
    counts: tuple[int, ...]
    joined: tuple[Tensor, float] | None = None

    def order(self, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Slots ``[batch, (kv_heads,) max(counts)]`` that go on, ascending, and valid ones ``[batch, max(counts)]``.

        ``real`` bool ``[batch, keys]``, None = all; valid None = all.
        """
        if self.keep.ndim == 2:
            return compacted(self.keep, real, self.counts)
        batch, heads, _ = self.keep.shape
        each = None if real is None else real[:, None].expand(-1, heads, -1).flatten(0, 1)
        order, valid = compacted(self.keep.flatten(0, 1), each, [n for n in self.counts for _ in range(heads)])
        if valid is not None:  # fillers lead, so that they lie alike in all heads
            lead = valid.byte().argsort(dim=1, stable=True)
            order, valid = order.gather(1, lead), valid.gather(1, lead).view(batch, heads, -1)[:, 0]
        return order.view(batch, heads, -1), valid


@dataclass(frozen=True)
class HeadSplit:
    """KV heads of a layer in two stores.

    Attributes:
        full: KV heads that keep every token.
        sinks, window: the others keep the first ``sinks`` real tokens of each sequence and its last ``window``.
        tokens: real tokens of each sequence so far.
        compensate: they also keep the mean of what they let go.
        late: a new token sees the whole window that was kept, and itself; else the window that ends in it.
    """

    full: tuple[int, ...]
    sinks: int
    window: tuple[int, ...]
    tokens: tuple[int, ...]
    compensate: bool
    late: bool
