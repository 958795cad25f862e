"""What one generate() call knows. A request rides on the KV cache, never on the model.

``Request`` lives as long as its cache; ``Step`` is one forward of the model; ``Scope`` is one layer of a step, which is
what a method sees. Everything is indexed by cache slot (absolute, padding included), not by position id.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmattn.errors import InputError
from vlmattn.kernels import AttentionEdit, Rows, Visibility

TEXT, IMAGE, VIDEO = 0, 1, 2


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

    def __init__(self, fill: int | bool, dtype: torch.dtype) -> None:
        self._fill, self._dtype = fill, dtype
        self._values: Tensor | None = None

    def _grow(self, length: int, batch: int, device: torch.device) -> Tensor:
        values = self._values
        if values is None or values.shape[1] < length:
            room = max(2 * length, 64)  # decoding appends one slot at a time: grow rarely
            grown = torch.full((batch, room), self._fill, dtype=self._dtype, device=device)
            if values is not None:
                grown[:, : values.shape[1]] = values
            self._values = values = grown
        return values

    def write(self, start: int, values: Tensor) -> None:
        """Set the slots from ``start`` on, and forget those behind (a cache may have been cropped before)."""
        stop = start + values.shape[1]
        slots = self._grow(stop, values.shape[0], values.device)
        slots[:, start:stop] = values.to(self._dtype)
        slots[:, stop:] = self._fill

    def read(self, length: int, device: torch.device) -> Tensor:
        """The first ``length`` slots ``[batch, length]`` on ``device``."""
        if self._values is None:
            raise InputError("slots were read before anything was written")
        return self._grow(length, self._values.shape[0], self._values.device)[:, :length].to(device)


class Method(Protocol):
    """What the engine asks of a method; ``interventions.base.Intervention`` is the real thing."""

    def prepare(self, preparation: Preparation) -> None: ...

    def observe(self, scope: Scope, hidden: Tensor) -> None: ...

    def edit(self, scope: Scope) -> AttentionEdit: ...


@dataclass(frozen=True)
class Plan:
    """A recipe bound to one model: which methods act in which layer."""

    name: str
    by_layer: tuple[tuple[Method, ...], ...] = ()
    preparing: tuple[Method, ...] = ()
    observing: tuple[tuple[Method, ...], ...] = ()

    @property
    def is_identity(self) -> bool:
        return not any(self.by_layer)


class Request:
    """The prompt of one generate() call and what the methods keep about it.

    Attributes:
        plan: the bound recipe that this request was born with.
        prompt_length: slots of the prompt (padding included); rows from there on are generated.
        ledger: where counts go; that of the model the request runs on.
        call: stands for the generate() call that read the prompt, if one did.
        batch: sequences in the prompt; None before it is read.
        state: what methods keep, by (method, layer, name).
    """

    def __init__(self, plan: Plan, ledger: Ledger | None = None) -> None:
        self.plan, self.ledger = plan, ledger or Ledger()
        self.call: object = None
        self.batch: int | None = None
        self.prompt_length = 0
        self.has_padding = False
        self.state: dict[Hashable, Any] = {}
        self._types = Slots(TEXT, torch.uint8)
        self._images = Slots(-1, torch.int16)
        self._real = Slots(True, torch.bool)
        self._runs: tuple[tuple[int, int, bool, bool], ...] = ()
        self._last_prompt_row: Tensor | None = None
        self._first_row_after_image = 0
        self._first_last_row = 0

    def extend(self, start: int, types: Tensor, images: Tensor, real: Tensor | None, prompt_length: int | None) -> None:
        """Read new prompt tokens that enter the cache at slot ``start``.

        Args:
            types: uint8 ``[batch, new]`` of TEXT, IMAGE, VIDEO.
            images: int ``[batch, new]``, which image of its row a token belongs to, -1 for text.
            real: bool ``[batch, start + new or more]``, False for padding; None = no padding.
            prompt_length: slots of the whole prompt when generate() said so, else all tokens given so far.
        """
        self.batch, stop = types.shape[0], start + types.shape[1]
        self.prompt_length = min(prompt_length or stop, stop)
        if start:  # a later turn: its images count on
            earlier = self._images.read(start, images.device).amax(1, keepdim=True) + 1
            images = torch.where(images >= 0, images + earlier, images)
        generated = torch.arange(start, stop, device=types.device) >= self.prompt_length
        self._types.write(start, types.masked_fill(generated, TEXT))
        self._images.write(start, images.masked_fill(generated, -1))
        self._real.write(start, torch.ones_like(types))
        if real is not None:
            self._real.write(0, real[:, :stop])
        # One look from the host per prompt: everything below decides shapes.
        host = torch.device("cpu")
        types, real = self._types.read(stop, host), self._real.read(stop, host)
        self.has_padding = not bool(real.all())
        slots = torch.arange(stop)
        in_prompt = real & (slots < self.prompt_length)
        last = torch.where(in_prompt, slots, -1).amax(1)
        self._last_prompt_row, self._first_last_row = last, max(int(last.min()), 0)
        visual = (types != TEXT) & real
        after = (types == TEXT) & (visual.cumsum(1) > 0)
        self._first_row_after_image = int(torch.where(after, slots, stop).min())
        self._runs = _column_runs((types == TEXT).any(0), (types != TEXT).any(0))

    @property
    def has_images(self) -> bool:
        return any(image for _, _, _, image in self._runs)

    def types(self, keys: int, device: torch.device) -> Tensor:
        """uint8 ``[batch, keys]``: TEXT, IMAGE or VIDEO; generated tokens are TEXT."""
        return self._types.read(keys, device)

    def images(self, keys: int, device: torch.device) -> Tensor:
        """int16 ``[batch, keys]``: number of the image within its row, -1 for text."""
        return self._images.read(keys, device)

    def real(self, keys: int, device: torch.device) -> Tensor | None:
        """bool ``[batch, keys]``, False for padding; None when there is none."""
        return self._real.read(keys, device) if self.has_padding else None

    def runs(self, text: tuple[int, ...], image: tuple[int, ...]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """Contiguous runs of prompt slots with the groups that occur there, given those of text and of image tokens."""
        return tuple((a, b, (text if t else ()) + (image if i else ())) for a, b, t, i in self._runs)

    def last_prompt_row(self, device: torch.device) -> Tensor:
        """int64 ``[batch]``: slot of the last real prompt token, the row that predicts the first new token."""
        if self._last_prompt_row is None:
            raise InputError("the prompt has not been read yet")
        return self._last_prompt_row.to(device)

    def rows_after_image(self, start: int, queries: int, device: torch.device) -> Rows:
        """Text rows that follow at least one image of their sequence."""
        types = self.types(start + queries, device)
        visual = types != TEXT
        if (real := self.real(start + queries, device)) is not None:
            visual = visual & real
        after = (types == TEXT) & (visual.cumsum(1) > 0)
        return Rows(after[:, start:], max(self._first_row_after_image - start, 0))

    def rows_that_predict(self, start: int, queries: int, device: torch.device) -> Rows:
        """The last prompt row of each sequence and every row generated after it."""
        slots = torch.arange(start, start + queries, device=device)
        return Rows(slots >= self.last_prompt_row(device)[:, None], max(self._first_last_row - start, 0))


def _column_runs(text: Tensor, image: Tensor) -> tuple[tuple[int, int, bool, bool], ...]:
    """Runs of columns (start, stop, some row has text here, some row has an image here)."""
    kinds = (text.int() + 2 * image.int()).tolist()
    cuts = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    return tuple((a, b, bool(kinds[a] & 1), bool(kinds[a] & 2)) for a, b in pairwise(cuts) if a < b)


@dataclass(eq=False)
class Step:
    """One forward of the model for a request.

    Attributes:
        base: name of the attention implementation the model had before it was wrapped.
        start: cache slot of the first query row; None in single-token decoding, where nothing needs it.
        plain_mask: the mask can only be causal and padding (no mask from the user).
        watch: for preparation passes: sees the head outputs ``[batch, query, heads, dim]`` of each layer and may return
            head gains ``[batch, heads]``; no edit runs then.
    """

    request: Request
    base: str
    start: int | None
    plain_mask: bool = True
    watch: Callable[[int, Tensor], Tensor | None] | None = None
    _memo: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def is_prompt(self) -> bool:
        """Prompt tokens are being read (not one new token after another, not the draft of assisted decoding)."""
        return self.start is not None and self.start < self.request.prompt_length

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A value that all layers of this step share."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]


@dataclass(frozen=True, eq=False)
class Scope:
    """One layer of one step: what a method is asked about."""

    step: Step
    layer: int
    queries: int
    keys: int
    device: torch.device

    @property
    def request(self) -> Request:
        return self.step.request

    @property
    def visual(self) -> Tensor:
        """bool ``[batch, keys]``: image and video tokens."""
        key = ("visual", self.keys, self.device)
        value: Tensor = self.step.once(key, lambda: self.request.types(self.keys, self.device) != TEXT)
        return value

    def rows_after_image(self) -> Rows | None:
        """Text rows that follow an image; None (all rows) while decoding one token."""
        return self._rows(self.request.rows_after_image)

    def rows_that_predict(self) -> Rows | None:
        """The last prompt row and all generated rows; None (all rows) while decoding one token."""
        return self._rows(self.request.rows_that_predict)

    def _rows(self, make: Callable[[int, int, torch.device], Rows]) -> Rows | None:
        start = self.step.start
        if start is None:
            return None
        rows: Rows = self.step.once((make.__name__, self.device), lambda: make(start, self.queries, self.device))
        return rows

    def visibility(self, mask: Tensor | None) -> Visibility:
        """What the unedited model sees in this call."""
        return Visibility(mask, self.step.start, self.request.real(self.keys, self.device), self.step.plain_mask)

    def state(self, method: Hashable, name: str, make: Callable[[], Any]) -> Any:
        """What ``method`` keeps under ``name`` for this layer and request; made by ``make`` at first."""
        return self.request.state.setdefault((method, self.layer, name), make())

    def find(self, method: Hashable, name: str) -> Any | None:
        """What ``method`` has kept under ``name`` for this layer, or None."""
        return self.request.state.get((method, self.layer, name))

    def count(self, method: str, amount: int | Tensor) -> None:
        """Tell the report that ``method`` found something to do."""
        self.request.ledger.add(("fired", method), amount)


@dataclass(frozen=True, eq=False)
class Preparation:
    """The decoder's inputs before a prompt is read, and a way to run the decoder on others.

    Attributes:
        embeds: ``[batch, prompt, hidden]``, image features in place.
        real: bool ``[batch, prompt]``.
        visual: bool ``[batch, prompt]``.
        positions: position ids ``[batch, prompt]``, ``[3 or 4, batch, prompt]`` (M-RoPE) or None.
        run: ``run(embeds, real, positions, watch)`` runs the decoder without cache; ``watch`` as in ``Step``.
    """

    request: Request
    layers: int
    embeds: Tensor
    real: Tensor
    visual: Tensor
    positions: Tensor | None
    run: Callable[[Tensor, Tensor, Tensor | None, Callable[[int, Tensor], Tensor | None]], None]


def number_images(types: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Number of the image of each visual token within its row, -1 for text.

    Args:
        types: ``[batch, tokens]``.
        lengths: tokens of each image, in (row, token) order, when the model said so; else every unbroken run of visual
            tokens counts as one image.
    """
    visual = types != TEXT
    previous = torch.nn.functional.pad(types, (1, 0))[:, :-1]
    starts = visual & (types != previous)
    if lengths and sum(lengths) == int(visual.sum()):
        flat = torch.zeros(int(visual.sum()), dtype=torch.bool)
        flat[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
        starts = torch.zeros_like(visual).masked_scatter(visual, flat.to(visual.device))
    return torch.where(visual, starts.cumsum(1) - 1, -1).to(torch.int16)
