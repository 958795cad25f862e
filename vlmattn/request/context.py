"""What a method sees of a request: a step is one forward of the model, a scope one layer of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlmattn.errors import InputError
from vlmattn.kernels import Mask, Rows, Visibility
from vlmattn.request.beside import SideStream
from vlmattn.request.plan import Compare, Method, Watch, Weights
from vlmattn.request.request import IMAGE, TEXT, VIDEO, Request
from vlmattn.request.slots import Slots
from vlmattn.request.token_map import Kept, TokenMap

Parts = tuple[tuple[slice, "Step | None"], ...]
"""Row groups of one forward, each with its step; None = unedited."""


@dataclass(eq=False)
class Steps:
    """One forward over row groups that have requests of their own: the main prompt and its branches.

    Attributes:
        parts: the groups in order.
        early: layer -> the residual stream that enters it, noted for layers that are keys here.
        blank: bool ``[batch, query]``, tokens whose embeddings are zeroed.
        merged: what the groups' logits become; None while a prompt is read.
    """

    parts: Parts
    early: dict[int, Tensor | None] = field(default_factory=dict)
    blank: Tensor | None = None
    merged: Any = None


@dataclass(eq=False)
class Step:
    """One forward of the model for a request.

    Attributes:
        base: name of the attention implementation the model had before it was wrapped.
        start: cache slot of the first query row; None in single-token decoding, where nothing needs it.
        plain_mask: the mask can only be causal and padding (no mask from the user).
        watch: for preparation passes and streams beside a prompt, where no edit runs.
        beside: streams that accompany this prompt.
        slot, capacity: where the one new token goes (a tensor with a static cache of that many slots), for methods that
            observe generated tokens too.
        sight: what was seen of each encoded image in the vision tower.
        seen: what one query row sees of so many keys, as the last layer had it.
        order: which encoded image each image of the prompt is (beams repeat them); None = by the rows they are in.
        rows: prompt rows that are still there; None = all.
        rotary: makes cosines and sines, for methods that count positions anew.
        masks: the mask in original slots as the last layer had it, and in the slots of this view.
        passed: slots that the layer's sliding window has left behind.
        wants_weights: the caller of the model asked for attention weights.
    """

    request: Request
    base: str
    start: int | None
    plain_mask: bool = True
    watch: Watch | None = None
    beside: tuple[SideStream, ...] = ()
    slot: int | Tensor | None = None
    capacity: int = 0
    sight: Any = None
    order: list[int] | None = None
    seen: tuple[int, Visibility] | None = None
    rows: Kept | None = None
    rotary: Callable[..., tuple[Tensor, Tensor]] | None = None
    masks: tuple[Tensor | None, Tensor | None] | None = None
    passed: int = 0
    wants_weights: bool = False
    _memo: dict[Hashable, Any] = field(default_factory=dict)

    def at(self, cache: Any) -> None:
        """Note where the one new token goes, for methods that observe generated tokens too."""
        slot = cache.get_seq_length()
        self.slot = slot.clone() if isinstance(slot, torch.Tensor) else slot  # a static cache counts on in place
        length = getattr(cache, "get_max_length", None) or cache.get_max_cache_shape  # by version of transformers
        self.capacity = length()

    @property
    def parts(self) -> Parts:
        """All rows belong to this step."""
        return ((slice(None), self),)

    @property
    def is_prompt(self) -> bool:
        """Prompt tokens are being read (not one new token after another, not the draft of assisted decoding)."""
        return self.start is not None and self.start < self.request.prompt_length

    def through(self, tokens: TokenMap | None) -> Step:
        """This step as layers see it that go on with some of the tokens."""
        if tokens is None:
            return self

        def make() -> Step:
            start = None if self.start is None else tokens.slot(self.start)
            slot = None if self.slot is None else self.slot - tokens.removed
            return replace(
                self,
                request=self.request.at(tokens, self.is_prompt),
                start=start,
                slot=slot,
                seen=None,
                masks=None,
                _memo={},
            )

        step: Step = self.memo(("through", tokens), make)
        return step

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A value that all layers of this step share."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]


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

    def state(self, method: Hashable, name: str, make: Callable[[], Any]) -> Any:
        """What ``method`` keeps under ``name`` for this layer and request; made by ``make`` at first."""
        key = (method, self.layer, name)
        if key not in self.request.state:
            self.request.state[key] = make()
        return self.request.state[key]

    def keep(self, method: Hashable, name: str, value: Any) -> None:
        """Let ``method`` keep a value under ``name`` for this layer."""
        self.request.state[(method, self.layer, name)] = value

    def kept(self, method: Hashable, name: str) -> Any:
        """What ``method`` has kept under ``name`` for this layer, and must have."""
        return self.request.state[(method, self.layer, name)]

    def find(self, method: Hashable, name: str) -> Any | None:
        """What ``method`` has kept under ``name`` for this layer, or None."""
        return self.request.state.get((method, self.layer, name))

    def read(self, kept: Slots) -> Tensor:
        """What a method has kept about the slots of this layer, ``[batch, keys]``."""
        passed = self.step.passed
        return kept.read(passed + self.keys, self.device)[:, passed:]

    def count(self, method: str, amount: int | Tensor) -> None:
        """Tell the report that ``method`` found something to do."""
        self.request.ledger.add(("fired", method), amount)


@dataclass(frozen=True, eq=False)
class PruningStage:
    """The rows of a prompt that enter a layer, for a method that chooses which of them go on.

    Attributes:
        request: as the layer before had it; layer: the layer that only the chosen rows reach.
        hidden: ``[batch, rows, hidden]``, the residual stream that enters it.
        visual: bool ``[batch, rows]``, image tokens. ``text``: other tokens of the prompt. ``images``: int16, number of the
            image within its row, -1 for text.
        counts: image tokens among the rows of each sequence; ``given``: tokens of each image that it had.
        weights: unedited attention that the layer would pay, see ``Weights``; rows count from the first of these.
        start: slot of the first row among the keys of ``weights``.
        tables: cosines and sines of the rows' positions, ``[batch or 1, rows, dim]``.
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
    tables: tuple[Tensor, Tensor]

    def top(self, scores: Tensor, counts: Sequence[int]) -> Tensor:
        """The ``counts`` image tokens of each sequence with the highest scores ``[batch, rows]``: bool ``[batch, rows]``."""
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
    """Slots of a layer's cache that stay: ``keep`` bool ``[batch, keys]``, ``counts`` of them that are real in each sequence."""

    keep: Tensor
    counts: tuple[int, ...]


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


@dataclass(frozen=True, eq=False)
class Image:
    """One image as the vision tower saw it.

    Attributes:
        attention: tower layer -> how much its summary token attends to each of its tokens, float32 ``[heads, tokens]``.
        keys: tower layer -> mean key over heads of each token, before any rotation, float32 ``[tokens, dim]``.
        features: what the tower says of each token, ``[tokens, width]``. ``summary``: and of the CLS token, ``[width]``, if it has one.
        project: makes features ``[n, width]`` what the language model gets.
    """

    attention: dict[int, Tensor]
    keys: dict[int, Tensor]
    features: Tensor
    summary: Tensor | None
    project: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """The images that new prompt tokens stand for, as the vision tower saw them.

    Attributes:
        start: cache slot of the first new token.
        types: uint8 ``[batch, new]``.
        patches: tower layer -> for each image (then each video) how much its summary token attends to each of its
            tokens, float32 ``[heads, tokens]``.
        images: the same images with more about them, for methods that drop tokens.
    """

    request: Request
    start: int
    types: Tensor
    patches: dict[int, list[Tensor]]
    images: tuple[Image, ...] = ()

    def place(self, values: list[Tensor]) -> Tensor:
        """Values ``[tokens, ...]`` of each image at the slots of the new tokens: ``[batch, new, ...]``, 0 for text.

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
        out = torch.zeros(*self.types.shape, *flat.shape[1:], dtype=flat.dtype, device=flat.device)
        out[images], out[videos] = flat[:split], flat[split:]
        return out


@dataclass(frozen=True, eq=False)
class Prefill:
    """The decoder's inputs before a prompt is read, and two ways to have the decoder run on others.

    Attributes:
        embeds: ``[batch, prompt, hidden]``, image features in place.
        real: bool ``[batch, prompt]``.
        visual: bool ``[batch, prompt]``.
        positions: position ids ``[batch, prompt]``, ``[3 or 4, batch, prompt]`` (M-RoPE) or None.
        run: ``run(embeds, positions, watch)`` runs the decoder at once, without cache, on embeddings of the same tokens, which
            see what they see in the prompt; ``watch`` as in ``Step``.
        beside: ``beside(method, embeds, real, positions, layers, compare)`` lets a ``SideStream`` of them go beside the prompt.
    """

    request: Request
    layers: int
    embeds: Tensor
    real: Tensor
    visual: Tensor
    positions: Tensor | None
    run: Callable[[Tensor, Tensor | None, Watch], None]
    beside: Callable[[Method, Tensor, Tensor, Tensor | None, frozenset[int], Compare], None]
