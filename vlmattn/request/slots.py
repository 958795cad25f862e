"""What a request keeps: counts for the report, and one value per cache slot."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmattn.errors import InputError


class Ledger:
    """Counts for ``report()``: summed lazily, so that counting on a device never waits for it."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, ...], int | Tensor] = {}

    def add(self, key: tuple[str, ...], amount: int | Tensor = 1) -> None:
        if torch.compiler.is_compiling():
            return  # counting would break the graph
        before = self.counts.get(key, 0)
        if isinstance(before, Tensor) and isinstance(amount, Tensor):
            amount = amount.to(before.device, non_blocking=True)  # layers may live on several devices
        self.counts[key] = before + amount

    def read(self, *prefix: str) -> dict[tuple[str, ...], int]:
        """Counts whose key starts with ``prefix``, by the rest of the key."""
        found = {k[len(prefix) :]: int(v) for k, v in list(self.counts.items()) if k[: len(prefix)] == prefix}
        return dict(sorted(found.items()))


class Slots:
    """One value per cache slot, ``[batch, slots]``. Slots that were never written hold ``fill``."""

    def __init__(self, fill: float | bool, dtype: torch.dtype) -> None:
        self.fill, self._dtype = fill, dtype
        self._values: Tensor | None = None

    @property
    def written(self) -> bool:
        return self._values is not None

    def _grow(self, length: int, batch: int, device: torch.device) -> Tensor:
        values = self._values
        if values is None or values.shape[1] < length:
            room = max(2 * length, 64)  # decoding appends one slot at a time: grow rarely
            grown = torch.full((batch, room), self.fill, dtype=self._dtype, device=device)
            if values is not None:
                grown[:, : values.shape[1]] = values
            self._values = values = grown
        return values

    def write(self, start: int, values: Tensor) -> None:
        """Set the slots from ``start`` on, and forget those behind (a cache may have been cropped before)."""
        stop = start + values.shape[1]
        slots = self._grow(stop, values.shape[0], values.device)
        slots[:, start:stop] = values.to(self._dtype)
        slots[:, stop:] = self.fill

    def put(self, slot: int | Tensor, values: Tensor, length: int) -> None:
        """Set one slot to ``values`` ``[batch]``; a static cache of ``length`` slots does not tell the host which."""
        if isinstance(slot, int):
            self.write(slot, values[:, None])
        else:
            slots = self._grow(length, len(values), values.device)
            slots.index_copy_(1, slot.reshape(1).to(slots.device), values[:, None].to(self._dtype))

    def reorder(self, rows: Tensor) -> None:
        """Let every row become what row ``rows`` ``[batch]`` was (beam search)."""
        if self._values is not None:
            self._values = self._values[rows.to(self._values.device)]

    def moved(self, rows: Tensor | None = None, shift: int = 0) -> Slots:
        """A copy in which row i is what ``rows[i]`` was and every value lies ``shift`` slots later."""
        copy = Slots(self.fill, self._dtype)
        if self._values is not None:
            values = self._values if rows is None else self._values[rows.to(self._values.device)]
            copy._values = torch.nn.functional.pad(values, (shift, 0), value=self.fill)
        return copy

    def hide(self, slots: Tensor) -> None:
        """Set the first slots to False where ``slots`` bool ``[batch, some]`` says so."""
        if self._values is not None:
            found = self._grow(slots.shape[1], len(slots), slots.device)
            found[:, : slots.shape[1]] &= ~slots.to(found.device)

    def picked(self, slots: Tensor, length: int) -> Slots:
        """A copy with what ``slots`` ``[batch, kept]`` held, and then what came from slot ``length`` on."""
        copy = Slots(self.fill, self._dtype)
        if self._values is not None:
            values = self._grow(length, len(slots), slots.device)
            copy._values = torch.cat([values.gather(1, slots.to(values.device)), values[:, length:]], 1)
        return copy

    def read(self, length: int, device: torch.device) -> Tensor:
        """The first ``length`` slots ``[batch, length]`` on ``device``."""
        if self._values is None:
            raise InputError("slots were read before anything was written")
        return self._grow(length, self._values.shape[0], self._values.device)[:, :length].to(device)
