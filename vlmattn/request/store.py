"""What methods keep about a prompt, by what it belongs to: a sequence, a cache slot, or all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmattn.request.slots import Slots


@dataclass(eq=False)
class Store:
    """What one method keeps about a prompt (``Request.store``) or about one layer of it (``LayerContext.store``).

    Attributes:
        rows: one value for each sequence: tensors ``[batch, ...]``, or lists and tuples of that length. They follow
            their sequence through beam search and through repeated rows.
        slots: one value for each cache slot, ``[batch, slots]``. They follow their sequence too, and their slot where a
            layer's cache is cropped or evicted.
        shared: what is the same for all sequences and slots, and stays.
        of_images: slots are keys of images in a layer of cross-attention, which stay where tokens move.
    """

    rows: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, Slots] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    of_images: bool = False

    def by_slot(self, name: str, fill: float | bool, dtype: torch.dtype) -> Slots:
        """The slots kept under ``name``; made at first, ``fill`` where nothing is written."""
        if name not in self.slots:
            self.slots[name] = Slots(fill, dtype)
        return self.slots[name]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is shared under ``name``; made at first."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def reorder(self, rows: Tensor) -> None:
        """Let every sequence's values become those of sequence ``rows`` ``[batch]``."""
        self.rows = {name: of_rows(values, rows) for name, values in self.rows.items()}
        for slots in self.slots.values():
            slots.reorder(rows)

    def moved(self, rows: Tensor | None, shift: int) -> Store:
        """A copy in which sequence i is what ``rows[i]`` was and every slot lies ``shift`` later."""
        return Store(
            {name: of_rows(values, rows) for name, values in self.rows.items()},
            {name: slots.moved(rows, 0 if self.of_images else shift) for name, slots in self.slots.items()},
            dict(self.shared),
            self.of_images,
        )

    def evict(self, order: Tensor, keys: int) -> None:
        """Keep the slots ``order`` ``[batch, kept]`` of the first ``keys``, and what lies behind these."""
        self.slots = {name: slots.picked(order, keys) for name, slots in self.slots.items()}


def of_rows(values: Any, rows: Tensor | None) -> Any:
    """A tensor ``[batch, ...]``, list or tuple of the sequences ``rows``; None = all as they are."""
    if rows is None:
        return values
    if isinstance(values, Tensor):
        return values[rows.to(values.device)]
    return type(values)(values[row] for row in rows.tolist())
