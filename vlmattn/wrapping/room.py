"""A cache layer with room to grow: the library's concatenates, which copies all keys and values for every new token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


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
