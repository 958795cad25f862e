"""Layers of a cache: one with room to grow, and one whose KV heads keep different tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmattn.compat import DynamicLayer
from vlmattn.errors import StateError, UnsupportedError
from vlmattn.kernels import SplitStates
from vlmattn.request import HeadSplit


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """As ``DynamicLayer``, but new tokens are written behind the others as long as there is room.

    ``keys`` and ``values`` stay what they are for everyone else: tensors ``[batch, heads, tokens, dim]``.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._stores: list[Tensor] = []
        self.keys, self.values = self._seat(keys, values, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[batch, heads, new, dim]`` and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self._seat(key_states, value_states, 0)
            return self.keys, self.values
        length, new = self.keys.shape[-2], key_states.shape[-2]
        if not all(map(_lies_in, (self.keys, self.values), self._stores)) or length + new > self._stores[0].shape[-2]:
            self._seat(self.keys, self.values, new)  # no room, or other rows since (beams)
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[..., length : length + new, :] = states
        self.keys, self.values = (store[..., : length + new, :] for store in self._stores)
        return self.keys, self.values

    def _seat(self, keys: Tensor, values: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """Move to stores with room for ``new`` tokens and some more."""
        length = keys.shape[-2]
        room = length + new + max(length // 8, 64)
        stores = [found.new_empty(*found.shape[:-2], room, found.shape[-1]) for found in (keys, values)]
        for store, found in zip(stores, (keys, values), strict=True):
            store[..., :length, :] = found
        self._stores = stores
        return stores[0][..., :length, :], stores[1][..., :length, :]


def _lies_in(found: Tensor, store: Tensor) -> bool:
    """Still the beginning of the store, also after a crop."""
    return found.data_ptr() == store.data_ptr() and found.stride() == store.stride() and len(found) == len(store)


class SplitLayer(DynamicLayer):  # type: ignore[misc]
    """A layer whose KV heads keep different tokens, each kind in a store of its own.

    ``keys`` and ``values`` hold every token, for the full heads; ``near`` the first and the last tokens, for the
    others.

    Places of a near store: the ``front``, then a window whose newest token is the last place. What leaves the window of
    a sequence goes to the front until there are ``sinks`` tokens, its first ones. What leaves later may go on as a
    mean, in a place of its own before the others.
    """

    is_croppable = False

    def __init__(self, layer: DynamicLayer, real: Tensor | None, split: HeadSplit) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        (batch, heads, length, _), device = layer.keys.shape, layer.keys.device
        self.split, self.front, self.length = split, 0, int(length)
        self.full_heads = torch.tensor(split.full, dtype=torch.long, device=device)
        self.near_heads = torch.tensor(
            [h for h in range(heads) if h not in split.full], dtype=torch.long, device=device
        )
        self.keys, self.values = layer.keys[:, self.full_heads], layer.values[:, self.full_heads]
        self.near = [states[:, self.near_heads] for states in (layer.keys, layer.values)]
        self.window = torch.tensor(split.window, device=device)
        self.count = torch.zeros(batch, device=device)
        wide = torch.promote_types(layer.keys.dtype, torch.float32)
        self.sums = [states.new_zeros(states[:, :, 0].shape, dtype=wide) for states in self.near if split.compensate]
        left = [tokens - window for tokens, window in zip(split.tokens, split.window, strict=True)]
        self.least, self.most = min(left), max(left)  # bounds of how many tokens have left a window
        self.settled = split.sinks == 0
        self.arriving: Tensor | None = None
        self.valid = torch.ones(batch, length, dtype=torch.bool, device=device) if real is None else real
        self.padding = (~self.valid).sum(1)
        if real is not None:
            self._close_up()
        self._trim()
        self.let_go = len(self.near_heads) * ((length - self.padding).sum() - self.valid.sum())

    def _close_up(self) -> None:
        """Move the tokens of the window to its right end."""
        front = torch.arange(self.front, device=self.valid.device).expand(len(self.valid), -1)
        order = self.valid[:, self.front :].to(torch.uint8).argsort(dim=1, stable=True) + self.front
        order = torch.cat([front, order], 1)
        self.near, self.valid = [picked(states, order) for states in self.near], self.valid.gather(1, order)

    def _trim(self) -> None:
        """Let what has left the window of its sequence go to the front, into the mean or away."""
        front, places = self.front, self.near[0].shape[-2]
        stop = places - min(self.split.window)  # places from here on are within all windows
        if stop <= front:
            return
        from_right = torch.arange(places - 1 - front, places - 1 - stop, -1, device=self.valid.device)
        leaves = self.valid[:, front:stop] & (from_right >= self.window[:, None])
        heads, seen, lost = [states[..., :front, :] for states in self.near], self.valid[:, :front], leaves
        if not self.settled:
            heads, seen, lost = self._seat(leaves)
            self.settled = self.least >= self.split.sinks
        if self.split.compensate:
            self.count = self.count + lost.sum(1)
            for sums, states in zip(self.sums, self.near, strict=True):
                sums += (states[..., front:stop, :].to(sums.dtype) * lost[:, None, :, None]).sum(2)
        begin = max(places - max(self.split.window), front)
        window = torch.cat([self.valid[:, front:stop] & ~leaves, self.valid[:, stop:]], 1)
        self.valid = torch.cat([seen, window[:, begin - front :]], 1)
        self.near = [
            torch.cat([head, states[..., begin:, :]], -2) for head, states in zip(heads, self.near, strict=True)
        ]
        self.front = seen.shape[1]

    def _seat(self, leaves: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The front with the first of those that leave the window, its valid places, and who found no place."""
        front, wanted = self.front, min(max(self.most, 0), self.split.sinks)
        room = wanted + 1 - front  # the last place takes those that get none
        place = self.valid[:, :front].sum(1, keepdim=True) + leaves.cumsum(1) - 1
        seated = leaves & (place < wanted)
        place = torch.where(seated, place, wanted)
        heads = []
        for states in self.near:
            leaving = states[..., front : front + leaves.shape[1], :]
            head = pad(states[..., :front, :], (0, 0, 0, room))
            heads.append(head.scatter(2, place[:, None, :, None].expand_as(leaving), leaving)[..., :-1, :])
        seen = pad(self.valid[:, :front], (0, room), value=False).scatter(1, place, torch.ones_like(leaves))[:, :-1]
        return heads, seen, leaves & ~seated

    def expect(self, real: Tensor | None) -> None:
        """Hear that a prompt comes next, and which slots of it and of all before are not padding (None = all).

        Raises:
            StateError: it hides tokens that the near heads have kept in place of others.
        """
        self.arriving = None
        if real is None:
            return
        if not torch.equal((~real[:, : self.length]).sum(1), self.padding):
            raise StateError(
                "the attention mask of this turn hides tokens of the turns before, which heads with a window have kept"
                " in place of others; continue sequences that ended at different lengths one by one"
            )
        self.padding = (~real).sum(1)
        new = real[:, self.length :]
        self.arriving = None if bool(new.all()) else new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append ``[batch, heads, new, dim]``; one token sees the window up to it, several the one before them too.

        With ``split.late`` one token, too, sees the window before it.
        """
        new, tokens, arriving = (key_states, value_states), key_states.shape[-2], self.arriving
        self.keys, self.values = (
            torch.cat([states, more[:, self.full_heads]], -2)
            for states, more in zip((self.keys, self.values), new, strict=True)
        )
        self.near = [
            torch.cat([states, more[:, self.near_heads]], -2) for states, more in zip(self.near, new, strict=True)
        ]
        fresh = self.valid.new_ones(len(self.valid), tokens) if arriving is None else arriving
        self.valid, self.arriving = torch.cat([self.valid, fresh], 1), None
        self.length, self.most = self.length + tokens, self.most + tokens
        if arriving is None:
            self.least += tokens
        if tokens == 1 and not self.split.late:
            self._trim()
            return self._states()
        found = self._states()
        if arriving is not None:
            self._close_up()
        self._trim()
        return found

    def _states(self) -> tuple[SplitStates, SplitStates]:
        valid, near, count = self.valid, self.near, None
        if self.split.compensate:
            count = self.count
            mean = [sums / count.clamp_min(1)[:, None, None] for sums in self.sums]
            near = [torch.cat([m[..., None, :].to(states), states], -2) for m, states in zip(mean, near, strict=True)]
            valid = torch.cat([(count > 0)[:, None], valid], 1)
        full = (self.keys, self.values)
        keys, values = (
            SplitStates(states, others, self.full_heads, self.near_heads, valid, count)
            for states, others in zip(full, near, strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        raise UnsupportedError(
            "heads that keep a window cannot take tokens back, as drafts of assisted decoding ask for; leave it out"
        )

    def reset(self) -> None:
        """Become the empty layer of the library that this one replaced: the next prompt may be another model's."""
        self.__dict__.clear()
        self.__class__ = DynamicLayer
        DynamicLayer.__init__(self)

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.to(self.keys.device)
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.near, self.sums = ([states[rows] for states in found] for found in (self.near, self.sums))
        self.valid, self.window, self.count = self.valid[rows], self.window[rows], self.count[rows]
        self.padding = self.padding[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(states.nbytes for states in (self.keys, self.values, *self.near, *self.sums))


def picked(states: Tensor, order: Tensor) -> Tensor:
    """Keys or values ``[batch, kv_heads, slot, dim]`` at the slots ``order`` ``[batch, (kv_heads,) kept]``."""
    _, heads, _, dim = states.shape
    order = order if order.ndim == 3 else order[:, None].expand(-1, heads, -1)
    return states.gather(2, order[..., None].expand(-1, -1, -1, dim))


def merged(states: Tensor, into: Tensor, share: float) -> Tensor:
    """Keys or values ``[batch, kv_heads, slot, dim]`` in which slots have become means of those that join them.

    ``into`` int64 ``[batch, kv_heads, slot]``: the slot that each joins; a slot that stays, or is padding, its own. Of
    what joins only ``share`` counts, and for the rest the slot itself.
    """
    joins = into != torch.arange(into.shape[-1], device=into.device)
    wide = torch.promote_types(states.dtype, torch.float32)
    count = torch.zeros(into.shape, dtype=wide, device=into.device).scatter_add_(2, into, joins.to(wide))[..., None]
    where, gone = into[..., None].expand(states.shape), states.to(wide) * joins[..., None]
    sums = torch.zeros_like(gone).scatter_add_(2, where, gone)
    mean = (states * (1 + (1 - share) * count) + share * sums) / (count + 1)
    return torch.where(count > 0, mean.to(states.dtype), states)
