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

TEXT, IMAGE, VIDEO = 0, 1, 2  # types of tokens
SYSTEM, USER, MARKER, ANSWER = range(4)  # roles: outside of turns, a user's turn, the text that ends it, the answer


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

    def put(self, slot: int | Tensor, values: Tensor, length: int) -> None:
        """Set one slot to ``values`` ``[batch]``, without knowing on the host which (static cache of ``length`` slots)."""
        if isinstance(slot, int):
            self.write(slot, values[:, None])
        else:
            slots = self._grow(length, len(values), values.device)
            slots.index_copy_(1, slot.reshape(1).to(slots.device), values[:, None].to(self._dtype))

    def reorder(self, rows: Tensor) -> None:
        """Let every row become what row ``rows`` ``[batch]`` was (beam search)."""
        if self._values is not None:
            self._values = self._values[rows.to(self._values.device)]

    def read(self, length: int, device: torch.device) -> Tensor:
        """The first ``length`` slots ``[batch, length]`` on ``device``."""
        if self._values is None:
            raise InputError("slots were read before anything was written")
        return self._grow(length, self._values.shape[0], self._values.device)[:, :length].to(device)


Weights = Callable[[int, int], Tensor]
"""``weights(start, stop)``: unedited attention, float32 ``[batch, heads, stop - start, key]``, of a few query rows."""

Watch = Callable[[int, Tensor, Weights], Tensor | None]
"""``watch(layer, out, weights)`` sees head outputs ``[batch, query, heads, dim]`` and may return head gains ``[batch, heads]``."""


class Method(Protocol):
    """What the engine asks of a method; ``interventions.base.Intervention`` is the real thing."""

    @property
    def observes_generated(self) -> bool: ...

    def prepare(self, preparation: Preparation) -> None: ...

    def encoded(self, sight: Sight) -> None: ...

    def observe(self, scope: Scope, hidden: Tensor) -> None: ...

    def measure(self, scope: Scope, weights: Weights) -> None: ...

    def edit(self, scope: Scope) -> AttentionEdit: ...


class RoleFinder(Protocol):
    """Finds the turns of a prompt (``models.Turns`` is the real thing)."""

    def roles(self, ids: Tensor, types: Tensor, real: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Directions:
    """What is added to a layer's projections before the rotation.

    Attributes:
        query: float ``[heads, dim]``; key: float ``[kv_heads, dim]``; None = nothing.
    """

    query: Tensor | None
    key: Tensor | None


@dataclass(frozen=True)
class Plan:
    """A recipe bound to one model: which methods act in which layer, and which steps they take part in.

    Attributes:
        by_layer, observing, measuring: methods of each layer.
        preparing, seeing: methods that run the decoder on other inputs, and that look at the vision tower.
        extending: layers whose observers also see generated tokens.
        directions: (layer, what is added to its projections).
        tower_layers: layers of the vision tower that ``seeing`` methods look at.
        turns: who needs to know where the user's turns are; ``uses_turns``: somebody wants to, if it can be known.
        texts: prompts without images are welcome.
    """

    name: str
    by_layer: tuple[tuple[Method, ...], ...] = ()
    preparing: tuple[Method, ...] = ()
    observing: tuple[tuple[Method, ...], ...] = ()
    measuring: tuple[tuple[Method, ...], ...] = ()
    seeing: tuple[Method, ...] = ()
    extending: frozenset[int] = frozenset()
    directions: tuple[tuple[int, Directions], ...] = ()
    tower_layers: frozenset[int] = frozenset()
    turns: tuple[str, ...] = ()
    uses_turns: bool = False
    texts: bool = False

    @property
    def is_identity(self) -> bool:
        return not any(self.by_layer)


class Request:
    """The prompt of one generate() call and what the methods keep about it.

    Attributes:
        plan: the bound recipe that this request was born with.
        prompt_length: slots of the prompt (padding included); rows from there on are generated.
        turns_known: roles and turns of the prompt were found.
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
        self._ids = Slots(-1, torch.int64)
        self._roles = Slots(ANSWER, torch.uint8)
        self._turns = Slots(-1, torch.int16)
        self.turns_known = False
        self._types = Slots(TEXT, torch.uint8)
        self._images = Slots(-1, torch.int16)
        self._real = Slots(True, torch.bool)
        self._runs: tuple[tuple[int, int, bool, bool], ...] = ()
        self._last_prompt_row: Tensor | None = None
        self._first_row_after_image = 0
        self._first_last_row = 0

    def extend(
        self,
        start: int,
        types: Tensor,
        images: Tensor,
        real: Tensor | None,
        prompt_length: int | None,
        ids: Tensor | None = None,
        finder: RoleFinder | None = None,
    ) -> None:
        """Read new prompt tokens that enter the cache at slot ``start``.

        Args:
            types: uint8 ``[batch, new]`` of TEXT, IMAGE, VIDEO.
            images: int ``[batch, new]``, which image of its row a token belongs to, -1 for text.
            real: bool ``[batch, start + new or more]``, False for padding; None = no padding.
            prompt_length: slots of the whole prompt when generate() said so, else all tokens given so far.
            ids: token ids ``[batch, new]``; None when the model got embeddings.
            finder: finds the turns, for plans that need them.

        Raises:
            InputError: turns are needed and there are no token ids, or a row without a user's turn.
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
        self._ids.write(start, torch.full_like(types[:, start:], -1, dtype=torch.int64) if ids is None else ids)
        if finder is not None:
            self._find_roles(finder, types, real, ids is not None)

    def _find_roles(self, finder: RoleFinder, types: Tensor, real: Tensor, has_ids: bool) -> None:
        needed_by = ", ".join(self.plan.turns)
        if not has_ids:
            if not needed_by:
                return
            raise InputError(
                f"{needed_by} must know the user's turns, which need input_ids; the model got inputs_embeds"
            )
        stop = types.shape[1]
        roles, turns = finder.roles(self._ids.read(stop, torch.device("cpu")), types, real)
        lost = (~(turns >= 0).any(1)).nonzero().flatten().tolist()
        if lost and needed_by:
            raise InputError(
                f"{needed_by} must know the user's turn, and row {lost[0]} of the prompt has none: {finder} not found; make"
                " prompts with processor.apply_chat_template"
            )
        generated = torch.arange(stop) >= self.prompt_length
        self._roles.write(0, roles.masked_fill(generated, ANSWER))
        self._turns.write(0, turns.masked_fill(generated, -1))
        self.turns_known = True

    @property
    def has_images(self) -> bool:
        return any(image for _, _, _, image in self._runs)

    def types(self, keys: int, device: torch.device) -> Tensor:
        """uint8 ``[batch, keys]``: TEXT, IMAGE or VIDEO; generated tokens are TEXT."""
        return self._types.read(keys, device)

    def images(self, keys: int, device: torch.device) -> Tensor:
        """int16 ``[batch, keys]``: number of the image within its row, -1 for text."""
        return self._images.read(keys, device)

    def ids(self, keys: int, device: torch.device) -> Tensor:
        """int64 ``[batch, keys]``: token ids of the prompt, -1 where they are not known and for generated tokens."""
        return self._ids.read(keys, device)

    def roles(self, keys: int, device: torch.device) -> Tensor:
        """uint8 ``[batch, keys]``: SYSTEM, USER, MARKER or ANSWER; for methods that ask for turns."""
        return self._roles.read(keys, device)

    def turns(self, keys: int, device: torch.device) -> Tensor:
        """int16 ``[batch, keys]``: number of the user's turn that a token belongs to, -1 elsewhere."""
        return self._turns.read(keys, device)

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
        watch: for preparation passes, where no edit runs.
        slot, capacity: where the one new token goes (a tensor with a static cache of that many slots), for methods that
            observe generated tokens too.
        sight: tower layer -> what was seen there of each encoded image, ``[heads, tokens]``.
        order: which encoded image each image of the prompt is (beams repeat them); None = one after another.
    """

    request: Request
    base: str
    start: int | None
    plain_mask: bool = True
    watch: Watch | None = None
    slot: int | Tensor | None = None
    capacity: int = 0
    sight: dict[int, list[Tensor]] = field(default_factory=dict)
    order: list[int] | None = None
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
    """One layer of one step: what a method is asked about.

    ``queries`` are the last of ``keys`` slots; ``heads`` is 0 before the layer's attention (``observe``).
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
    def visual(self) -> Tensor:
        """bool ``[batch, keys]``: image and video tokens."""
        return self._once("visual", lambda keys, device: self.request.types(keys, device) != TEXT)

    @property
    def images(self) -> Tensor:
        """int16 ``[batch, keys]``: number of the image within its row, -1 for text."""
        return self._once("images", self.request.images)

    @property
    def ids(self) -> Tensor:
        """int64 ``[batch, keys]``: token ids, -1 for generated tokens."""
        return self._once("ids", self.request.ids)

    @property
    def roles(self) -> Tensor:
        """uint8 ``[batch, keys]``: SYSTEM, USER, MARKER, ANSWER."""
        return self._once("roles", self.request.roles)

    @property
    def turns(self) -> Tensor:
        """int16 ``[batch, keys]``: number of the user's turn, -1 outside."""
        return self._once("turns", self.request.turns)

    @property
    def real(self) -> Tensor | None:
        """bool ``[batch, keys]``, False for padding; None when there is none."""
        return self.request.real(self.keys, self.device)

    def _once(self, name: str, read: Callable[[int, torch.device], Tensor]) -> Tensor:
        value: Tensor = self.step.once((name, self.keys, self.device), lambda: read(self.keys, self.device))
        return value

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A value that all layers of this step on this device share."""
        return self.step.once((key, self.keys, self.device), make)

    def first_token(self, hidden: Tensor) -> Tensor:
        """``hidden`` ``[batch, query, ...]`` of each row's first real token, float32, of a prompt read from its beginning."""
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
        key = (method, self.layer, name)
        if key not in self.request.state:
            self.request.state[key] = make()
        return self.request.state[key]

    def find(self, method: Hashable, name: str) -> Any | None:
        """What ``method`` has kept under ``name`` for this layer, or None."""
        return self.request.state.get((method, self.layer, name))

    def count(self, method: str, amount: int | Tensor) -> None:
        """Tell the report that ``method`` found something to do."""
        self.request.ledger.add(("fired", method), amount)


@dataclass(frozen=True, eq=False)
class Sight:
    """The images that new prompt tokens stand for, as the vision tower saw them.

    Attributes:
        start: cache slot of the first new token.
        types: uint8 ``[batch, new]``.
        patches: tower layer -> for each image (then each video) how much its summary token attends to each of its
            tokens, float32 ``[heads, tokens]``.
    """

    request: Request
    start: int
    types: Tensor
    patches: dict[int, list[Tensor]]

    def place(self, values: list[Tensor]) -> Tensor:
        """One value per image token, given image by image, at the slots of the new tokens: ``[batch, new]``, 0 for text.

        Raises:
            InputError: not as many values as image tokens.
        """
        flat = torch.cat(values).to(self.types.device)
        images, videos = self.types == IMAGE, self.types == VIDEO
        split = int(images.sum())
        if split + int(videos.sum()) != len(flat):
            raise InputError(
                f"the vision tower saw {len(flat)} image tokens and the prompt has {split + int(videos.sum())}; give the"
                " images with the prompt, not features that were computed before"
            )
        out = torch.zeros(self.types.shape, dtype=flat.dtype, device=flat.device)
        return out.masked_scatter(images, flat[:split]).masked_scatter(videos, flat[split:])


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
    run: Callable[[Tensor, Tensor, Tensor | None, Watch], None]


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
