"""Which tokens of a prompt a layer goes on with: the one owner of the bookkeeping that dropping them takes.

Original slots are those of a cache that keeps everything, the ones that the library counts: its masks, position ids and
``get_seq_length()`` speak of them. A layer that goes on with fewer tokens has slots of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmattn.kernels import additive, hide

_NEVER = -1  # in place of where the newest tokens begin: no forward begins there


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows of one forward that are still there, by original slot.

    Attributes:
        slots: int64 ``[batch, rows]``, ascending, behind padding and fillers.
        valid: bool ``[batch, rows]``, False for padding and for fillers that make the rows of a batch equally long;
            None = all True.
        visual: image tokens that are left in each sequence.
        compact: position ids are counted anew.
    """

    slots: Tensor
    valid: Tensor | None
    visual: tuple[int, ...]
    compact: bool = False

    def narrowed(
        self, keep: Tensor, visual: Sequence[int], text: Sequence[int], drop: bool, compact: bool
    ) -> tuple[Kept, Tensor]:
        """With fewer rows, and which of the present rows these are: int64 ``[batch, rows]``.

        Args:
            keep: bool ``[batch, rows]`` of the present rows; padding does not count.
            visual, text: image tokens and others that stay in each sequence.
            drop: rows really go; else they only become invalid.
        """
        compact = compact or self.compact
        if not drop:
            stay = keep if self.valid is None else keep & self.valid
            order = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape)
            return Kept(self.slots, stay, tuple(visual), compact), order
        order, valid = compacted(keep, self.valid, [v + t for v, t in zip(visual, text, strict=True)])
        if valid is not None:  # fillers lead, as padding does: a layer that keeps a state has none of it yet
            lead = valid.byte().argsort(dim=1, stable=True)
            order, valid = order.gather(1, lead), valid.gather(1, lead)
        return Kept(self.slots.gather(1, order), valid, tuple(visual), compact), order


def compacted(keep: Tensor, valid: Tensor | None, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Places ``[batch, max(counts)]`` of those that stay, ascending, and which of them are no fillers (None = all).

    Args:
        keep, valid: bool ``[batch, places]``, of which ``counts`` are both in each sequence.
    """
    stay = keep if valid is None else keep & valid
    rank = torch.where(stay, 0, 2)
    if valid is not None:
        rank = torch.where(valid, rank, 1)  # fillers are padding where there is some
    order = rank.argsort(dim=1, stable=True)[:, : max(counts)].sort(1).values
    return order, None if min(counts) == max(counts) else stay.gather(1, order)


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The slots of one layer: slot j holds original slot ``slots[:, j]``; what came later lies behind, without gaps.

    Attributes:
        slots: int64 ``[batch, kept]``, ascending, but that fillers lead the rows of a forward.
        valid: bool ``[batch, kept]``, False where nobody may look; None = all True.
        length: original slots that the map speaks of; slot j from ``kept`` on is original slot ``j + removed``.
        begin, at: where the newest of them begin, originally and in this layer.
        lost: int64 ``[batch]``, by how much later position ids are lower because positions are counted anew; None =
            they stay.
    """

    slots: Tensor
    valid: Tensor | None
    length: int
    begin: int
    at: int
    lost: Tensor | None = None

    @classmethod
    def of(cls, before: TokenMap | None, kept: Kept, begin: int, stop: int, real: Tensor | None) -> TokenMap:
        """What ``kept`` of the original slots ``begin:stop`` come to behind what the layer had before.

        Args:
            real: bool ``[batch, stop]``, original slots that are not padding; None = all.
        """
        old = torch.arange(begin, device=kept.slots.device).expand(len(kept.slots), -1)
        old_valid = None if real is None else real[:, :begin]
        if before is not None:
            before = before.until(begin)
            old = torch.cat([before.slots, old[:, before.length :]], 1)
            if before.valid is not None:
                rest = (
                    before.valid.new_ones(len(old), begin - before.length)
                    if old_valid is None
                    else old_valid[:, before.length :]
                )
                old_valid = torch.cat([before.valid, rest], 1)
        slots = torch.cat([old, kept.slots], 1)
        valid = None
        if old_valid is not None or kept.valid is not None:
            ones = torch.ones_like(slots, dtype=torch.bool)
            parts = (old_valid, ones[:, : old.shape[1]]), (kept.valid, ones[:, old.shape[1] :])
            valid = torch.cat([one if found is None else found for found, one in parts], 1)
        lost = None
        if kept.compact:
            before_count = stop if real is None else real[:, :stop].sum(1)
            after_count = slots.shape[1] if valid is None else valid.sum(1)
            lost = (torch.zeros_like(slots[:, 0]) + before_count) - after_count
        return cls(slots, valid, stop, begin, old.shape[1], lost)

    @classmethod
    def evicted(cls, before: TokenMap | None, order: Tensor, valid: Tensor | None, keys: int) -> TokenMap:
        """What is left when of the ``keys`` slots that a layer had those at ``order`` stay, ``valid`` or not."""
        old = torch.arange(keys, device=order.device).expand(len(order), -1)
        length = keys
        if before is not None:
            length = keys + before.removed
            old = torch.cat([before.slots, old[:, before.kept :] + before.removed], 1)
        return cls(old.gather(1, order), valid, length, _NEVER, _NEVER, None if before is None else before.lost)

    @classmethod
    def window(cls, batch: int, first: int, stop: int, device: torch.device) -> TokenMap:
        """The original slots from ``first`` to ``stop``, and all behind them: what a sliding window has left."""
        return cls(torch.arange(first, stop, device=device).expand(batch, -1), None, stop, -1, -1)

    def until(self, stop: int) -> TokenMap:
        """Without the original slots from ``stop`` on: drafts that were read with the prompt and cut off."""
        if (cut := self.length - stop) <= 0:
            return self
        valid = None if self.valid is None else self.valid[:, :-cut]
        return replace(self, slots=self.slots[:, :-cut], valid=valid, length=stop)

    @property
    def kept(self) -> int:
        return self.slots.shape[1]

    @property
    def by_eviction(self) -> bool:
        """A policy took slots out, row by row; else tokens of a prompt were dropped, alike in all its beams."""
        return self.begin == self.at == _NEVER

    @property
    def removed(self) -> int:
        """By how much the layer's cache is shorter."""
        return self.length - self.kept

    def slot(self, original: int) -> int:
        """The layer's slot of an original slot where a forward begins."""
        return self.at if original == self.begin else original - self.removed

    def rows(self, values: Tensor) -> Tensor:
        """The kept ones of the newest rows ``[batch or 1, rows, ...]``, one per original slot from ``begin`` on."""
        index = (self.slots[:, self.at :] - self.begin).to(values.device)
        shape = (*index.shape, *values.shape[2:])
        return values.expand(len(index), *values.shape[1:]).gather(
            1, index.view(*index.shape, *(1,) * (values.ndim - 2)).expand(shape)
        )

    def spread(self, values: Tensor, fill: float | bool) -> Tensor:
        """Values ``[batch, keys]`` of this layer's slots by original slot; those that are gone get ``fill``."""
        where = self.slots.to(values.device)
        out = values.new_full((len(where), self.length), fill).scatter(1, where, values[:, : self.kept])
        return torch.cat([out, values[:, self.kept :]], 1)

    def positions(self, given: Tensor, newest: bool) -> Tensor:
        """Position ids counted anew, ``[batch, query]``, from those of the library ``[batch or 1, query]``.

        ``newest``: of the newest rows, not of some that came later.
        """
        assert self.lost is not None
        if newest:
            real = torch.ones_like(self.slots) if self.valid is None else self.valid.long()
            place = real.cumsum(1)[:, self.at :].to(given.device)
            last = given[:, -1:] - self.lost[:, None].to(given.device)  # some models count from 1
            return (last - place[:, -1:] + place).clamp_min(0)
        return given - self.lost[:, None].to(given.device)

    def columns(self, first: int, stop: int) -> Tensor:
        """Original slots ``[batch, stop - first]`` of this layer's slots from ``first`` on."""
        tail = torch.arange(max(first, self.kept), stop, device=self.slots.device) + self.removed
        return torch.cat([self.slots[:, first:stop], tail.expand(len(self.slots), -1)], 1)

    def behind(self, passed: int) -> TokenMap:
        """Without the first slots of this layer, which its sliding window has left behind."""
        kept = max(self.kept - passed, 0)
        valid, at = None if self.valid is None else self.valid[:, passed:], self.at
        at = at if self.begin == _NEVER else at - passed
        return replace(self, slots=self.slots[:, passed:], valid=valid, length=kept + self.removed + passed, at=at)

    def mask(
        self,
        given: Tensor | None,
        start: int,
        queries: int,
        width: int,
        dtype: torch.dtype | None,
        passed: int = 0,
        offset: int = 0,
    ) -> Tensor | None:
        """The mask of a forward in this layer's slots, from the one in original slots.

        Args:
            given: bool or additive ``[batch or 1, heads or 1, query, original slot]``; None = causal, or everything for
                one row.
            start: original slot of the first query row; queries: rows of the layer in this forward.
            width: slots that the layer's attention gets to see.
            dtype: of additive masks, for attention that wants one; None = bool.
            passed: slots that the layer's sliding window has left behind; offset: original slot of the first column
                of ``given``, all before which are hidden.
        """
        stop = passed + width
        if stop < self.kept:
            return self.until(stop + self.removed).mask(given, start, queries, width, dtype, passed, offset)
        newest = start == self.begin
        if given is None:
            if self.valid is None:
                return None
            given, offset = self._causal(start, self.length - start if newest else queries, dtype), 0
        if newest:
            given = self.rows(given.expand(len(self.slots), -1, -1, -1).transpose(1, 2)).transpose(1, 2)
        columns = self.columns(passed, stop).to(given.device) - offset
        batch, heads, rows, original = (len(columns), *given.shape[1:])
        wanted = columns.clamp(0, original - 1)[:, None, None].expand(batch, heads, rows, -1)
        out = given.expand(batch, -1, -1, -1).gather(3, wanted)
        if self.valid is not None:
            seen = pad(self.valid[:, passed:].to(given.device), (0, stop - max(self.kept, passed)), value=True)
            out = hide(out, ~seen[:, None, None])
        if stop > self.kept and stop + self.removed - offset > original:  # a static cache has room behind
            out = hide(out, (columns >= original)[:, None, None])
        if offset:
            out = hide(out, (columns < 0)[:, None, None])
        if newest and self.valid is not None:  # rows that nobody looks at see themselves: no NaN comes of them
            own = torch.eye(rows, width, dtype=torch.bool, device=given.device).roll(self.at - passed, 1)
            own = own & ~self.valid[:, None, self.at :, None].to(given.device)
            out = out | own if out.dtype == torch.bool else out.masked_fill(own, 0.0)
        return out

    def _causal(self, start: int, queries: int, dtype: torch.dtype | None) -> Tensor:
        keys = torch.arange(start + queries, device=self.slots.device)
        sees = (keys <= keys[start:, None])[None, None]
        return sees if dtype is None else additive(sees, dtype)

    def moved(self, rows: Tensor) -> TokenMap:
        """For a cache in which row i is what ``rows[i]`` was."""

        def picked(values: Tensor) -> Tensor:
            return values[rows.to(values.device)]

        valid, lost = (None if values is None else picked(values) for values in (self.valid, self.lost))
        return replace(self, slots=picked(self.slots), valid=valid, lost=lost)
