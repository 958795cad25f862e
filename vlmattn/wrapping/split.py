"""A cache layer whose KV heads keep different tokens, each kind in a store of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vlmattn.errors import UnsupportedError
from vlmattn.kernels import SplitStates
from vlmattn.request import HeadSplit


class SplitLayer(DynamicLayer):  # type: ignore[misc]
    """``keys`` and ``values`` hold every token, for the full heads; ``near`` ones the first and the last tokens, for the others.

    Places of a near store: ``sinks`` first tokens of each sequence, then a window whose newest token is the last place. What
    leaves the window may go on as a mean, in a place of its own before the others.
    """

    is_croppable = False

    def __init__(self, layer: DynamicLayer, real: Tensor | None, split: HeadSplit) -> None:
        super().__init__()
        device, heads = layer.keys.device, layer.keys.shape[1]
        self.lazy_initialization(layer.keys, layer.values)
        self.split = split
        self.length: int = layer.keys.shape[-2]
        self.full_heads = torch.tensor(split.full, dtype=torch.long, device=device)
        self.near_heads = torch.tensor(
            [h for h in range(heads) if h not in split.full], dtype=torch.long, device=device
        )
        self.keys, self.values = layer.keys[:, self.full_heads], layer.values[:, self.full_heads]
        near = [layer.keys[:, self.near_heads], layer.values[:, self.near_heads]]
        batch, _, _, _dim = near[0].shape
        self.window = torch.tensor(split.window, device=device)
        self.count = torch.zeros(batch, device=device)
        self.sums = [torch.zeros(*states.shape[:2], states.shape[-1], device=device) for states in near]
        real = torch.ones(batch, self.length, dtype=torch.bool, device=device) if real is None else real
        order = real.to(torch.uint8).argsort(dim=1, stable=True)  # the real tokens, in order, to the right
        first = (~real).sum(1, keepdim=True) + torch.arange(split.sinks, device=device)
        places = torch.arange(self.length, device=device).expand(batch, -1)
        sinks = first < self.length
        self.valid = torch.cat([sinks, real.gather(1, order) & (places >= first[:, :1] + split.sinks)], 1)
        where = torch.cat([first.clamp_max(self.length - 1), places], 1)
        self.near = [picked(states, order.gather(1, where)) for states in near]
        self._trim()
        self.let_go = len(self.near_heads) * (real.sum() - self.valid.sum())

    def _trim(self) -> None:
        """Let go what has left the window of its sequence."""
        sinks, places = self.split.sinks, self.near[0].shape[-2]
        from_right = torch.arange(places - 1, -1, -1, device=self.valid.device)
        sink = torch.arange(places, device=self.valid.device) < sinks
        gone = self.valid & ~sink & (from_right >= self.window[:, None])
        if self.split.compensate:
            self.count = self.count + gone.sum(1)
            for sums, states in zip(self.sums, self.near, strict=True):
                sums += (states.float() * gone[:, None, :, None]).sum(2)
        self.valid = self.valid & ~gone
        begin = max(places - max(self.split.window), sinks)
        if begin > sinks:
            self.valid = torch.cat([self.valid[:, :sinks], self.valid[:, begin:]], 1)
            self.near = [torch.cat([states[..., :sinks, :], states[..., begin:, :]], -2) for states in self.near]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append ``[batch, heads, new, dim]``; what attention gets still has what leaves the window with the last of them."""
        new = [key_states, value_states]
        self.keys, self.values = (
            torch.cat([states, more[:, self.full_heads]], -2)
            for states, more in zip((self.keys, self.values), new, strict=True)
        )
        self.length += key_states.shape[-2]
        self.near = [
            torch.cat([states, more[:, self.near_heads]], -2) for states, more in zip(self.near, new, strict=True)
        ]
        self.valid = torch.nn.functional.pad(self.valid, (0, key_states.shape[-2]), value=True)
        if key_states.shape[-2] == 1:
            self._trim()
            return self._states()
        found = self._states()
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
        raise UnsupportedError("a cache that keeps its heads apart cannot be used for another prompt; give a new one")

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]
        self.near, self.sums = ([states[indices] for states in found] for found in (self.near, self.sums))
        self.valid, self.window, self.count = self.valid[indices], self.window[indices], self.count[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx.to(self.keys.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(
            states.nbytes
            for states in (self.keys, self.values, *self.near, *(self.sums if self.split.compensate else ()))
        )


def picked(states: Tensor, order: Tensor) -> Tensor:
    """Keys or values ``[batch, kv_heads, slot, dim]`` at the slots ``order`` ``[batch, kept]``."""
    _, heads, _, dim = states.shape
    return states.gather(2, order[:, None, :, None].expand(-1, heads, -1, dim))
