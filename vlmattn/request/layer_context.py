"""What a method sees of one layer of one forward."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmattn.kernels import Mask, Rows, Visibility
from vlmattn.request.numbering import TEXT
from vlmattn.request.request import ANSWER, Request
from vlmattn.request.slots import Slots
from vlmattn.request.step import Step
from vlmattn.request.store import Store


@dataclass(frozen=True, eq=False)
class LayerContext:
    """One layer of one step: what a method is asked about.

    ``queries`` are the last of ``keys`` slots; ``heads`` is 0 before the layer's attention (``on_hidden_states``).
    """

    step: Step
    layer: int
    queries: int
    keys: int
    device: torch.device
    heads: int = 0

    @property
    def request(self) -> Request:
        return self.step.request

    @property
    def crosses(self) -> bool:
        """The keys are images that are no tokens of the prompt."""
        return False

    @property
    def tokens(self) -> LayerContext:
        """The same with the tokens of the prompt as keys."""
        return self

    @property
    def visual(self) -> Tensor:
        """bool ``[batch, keys]``: image and video tokens."""
        return self._memo_of("visual", lambda keys, device: self.request.types(keys, device) != TEXT)

    @property
    def images(self) -> Tensor:
        """int16 ``[batch, keys]``: number of the image within its row, -1 for text."""
        return self._memo_of("images", self.request.images)

    @property
    def ids(self) -> Tensor:
        """int64 ``[batch, keys]``: token ids, -1 for generated tokens."""
        return self._memo_of("ids", self.request.ids)

    @property
    def roles(self) -> Tensor:
        """uint8 ``[batch, keys]``: SYSTEM, USER, MARKER, ANSWER."""
        return self._memo_of("roles", self.request.roles)

    @property
    def turns(self) -> Tensor:
        """int16 ``[batch, keys]``: number of the user's turn, -1 outside."""
        return self._memo_of("turns", self.request.turns)

    @property
    def real(self) -> Tensor | None:
        """bool ``[batch, keys]``, False for padding; None when there is none."""
        return self.request.real(self.keys, self.device)

    def _memo_of(self, name: str, read: Callable[[int, torch.device], Tensor]) -> Tensor:
        value: Tensor = self.step.memo((name, self.keys, self.device), lambda: read(self.keys, self.device))
        return value

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A value that all layers of this step on this device share."""
        return self.step.memo((key, self.keys, self.device), make)

    def first_token(self, hidden: Tensor) -> Tensor:
        """``hidden`` ``[batch, query, ...]`` of each row's first real token, float32; the prompt begins here."""
        real = self.real
        first = (
            torch.zeros(len(hidden), dtype=torch.long, device=hidden.device) if real is None else real.int().argmax(1)
        )
        return hidden[torch.arange(len(hidden), device=hidden.device), first].float()

    def of_rows(self, values: Tensor, generated: int | bool) -> Tensor:
        """The query rows' part ``[batch, query]`` of ``values`` ``[batch, keys]``; ``generated`` while decoding."""
        start = self.step.start
        if start is None:
            return values.new_full((values.shape[0], self.queries), generated)
        return values[:, start : start + self.queries]

    def rows_after_image(self) -> Rows | None:
        """Text rows that follow an image; None: all rows."""
        if not self.step.is_prompt:  # the image may have left a sliding window
            row: Rows | None = self.memo("generated row", lambda: self.request.generated_row_after_image(self.device))
            return row if row is None or self.queries == 1 else Rows(row.mask.expand(-1, self.queries))
        return self._rows(self.request.rows_after_image)

    def rows_that_predict(self) -> Rows | None:
        """The last prompt row and all generated rows; None (all rows) while decoding one token."""
        return self._rows(self.request.rows_that_predict)

    def _rows(self, make: Callable[[int, int, torch.device], Rows]) -> Rows | None:
        start = self.step.start
        if start is None:
            return None
        rows: Rows = self.step.memo((make.__name__, self.device), lambda: make(start, self.queries, self.device))
        return rows

    def runs(self, text: tuple[int, ...], image: tuple[int, ...]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """Runs of keys (start, stop, groups that occur there), given the groups of text and of image tokens."""
        runs = self.request.runs(text, image)
        return tuple((a, min(b, self.keys), groups) for a, b, groups in runs if a < self.keys)  # more may be to come

    def visibility(self, mask: Tensor | None) -> Visibility:
        """What the unedited model sees in this call; in a decode step the same for all layers with the same mask."""
        known = self.step.seen
        if known is not None and known[0] == self.keys and known[1].mask is mask:
            return known[1]
        one_row = Mask.of(mask[..., : self.keys]) if mask is not None and self.queries == 1 else None
        real = self.request.real(self.keys, self.device)
        see = Visibility(mask, self.step.start, real, self.step.plain_mask, one_row)
        if self.queries == 1:
            self.step.seen = (self.keys, see)
        return see

    def store(self, method: Hashable) -> Store:
        """What ``method`` keeps about this layer of the prompt."""
        return self.request.store(method, self.layer)

    def read(self, kept: Slots) -> Tensor:
        """What a method has kept about the slots of this layer, ``[batch, keys]``."""
        passed = self.step.passed
        return kept.read(passed + self.keys, self.device)[:, passed:]

    def count(self, method: str, amount: int | Tensor) -> None:
        """Tell the report that ``method`` found something to do."""
        self.request.ledger.add(("fired", method), amount)


@dataclass(frozen=True, eq=False)
class ImageContext(LayerContext):
    """A layer of cross-attention: rows are tokens, all of them text, and keys are images, ``each`` for one image."""

    each: int = 0

    @property
    def crosses(self) -> bool:
        return True

    @property
    def tokens(self) -> LayerContext:
        stop = self.queries if self.step.start is None else self.step.start + self.queries
        return LayerContext(self.step, self.layer, self.queries, stop, self.device, self.heads)

    @property
    def visual(self) -> Tensor:
        return self._all(True, torch.bool)

    @property
    def images(self) -> Tensor:
        numbers = torch.arange(self.keys, device=self.device) // max(self.each, 1)
        return numbers.to(torch.int16).expand(self._batch, -1)

    @property
    def ids(self) -> Tensor:
        return self._all(-1, torch.int64)

    @property
    def roles(self) -> Tensor:
        return self._all(ANSWER, torch.uint8)

    @property
    def turns(self) -> Tensor:
        return self._all(-1, torch.int16)

    @property
    def real(self) -> Tensor | None:
        return None

    @property
    def _batch(self) -> int:
        return self.request.batch or 1

    def _all(self, value: int | bool, dtype: torch.dtype) -> Tensor:
        return torch.full((self._batch, self.keys), value, dtype=dtype, device=self.device)

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        return self.step.memo(("images", key, self.keys, self.device), make)

    def of_rows(self, values: Tensor, generated: int | bool) -> Tensor:
        """``generated`` for every row, as no row is among the keys."""
        return values.new_full((values.shape[0], self.queries), generated)

    def runs(self, text: tuple[int, ...], image: tuple[int, ...]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        return ((0, self.keys, image),)

    def visibility(self, mask: Tensor | None) -> Visibility:
        if mask is None:
            mask = torch.ones(1, 1, self.queries, self.keys, dtype=torch.bool, device=self.device)
        one_row = Mask.of(mask[..., : self.keys]) if self.queries == 1 else None
        return Visibility(mask, None, None, False, one_row)

    def store(self, method: Hashable) -> Store:
        """What ``method`` keeps about the images in this layer, by key."""
        store = super().store(method)
        store.of_images = True
        return store

    def read(self, kept: Slots) -> Tensor:
        return kept.read(self.keys, self.device)
