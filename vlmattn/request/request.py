"""The prompt of one generate() call and what the methods keep about it. It rides on the KV cache, never on the model.

Everything is indexed by cache slot (absolute, padding included), not by position id.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmattn.errors import InputError
from vlmattn.kernels import Rows
from vlmattn.request.numbering import TEXT
from vlmattn.request.slots import Ledger, Slots
from vlmattn.request.store import Store, of_rows
from vlmattn.request.token_map import Kept, TokenMap

_SLOTS = ("_ids", "_roles", "_turns", "_types", "_images", "_real")
SYSTEM, USER, MARKER, ANSWER = range(4)  # roles: outside of turns, a user's turn, the text that ends it, the answer


class RoleFinder(Protocol):
    """Finds the turns of a prompt (``models.Turns`` is the real thing)."""

    def roles(self, ids: Tensor, types: Tensor, real: Tensor) -> tuple[Tensor, Tensor]: ...

    def content(self, ids: Tensor, roles: Tensor) -> Tensor: ...


class Request:
    """The prompt of one generate() call and what the methods keep about it.

    Attributes:
        layers: of the decoder.
        counts: how many tokens each image has is known on the host, for methods that drop some.
        prompt_length: slots of the prompt (padding included); rows from there on are generated.
        ids_known: the prompt came as token ids.
        turns_known: roles and turns of the prompt were found.
        ledger: where counts go; that of the model the request runs on.
        call: stands for the generate() call that read the prompt, if one did.
        batch: sequences in the prompt; None before it is read.
        maps: for each layer which tokens it goes on with; None = all.
        newest: real tokens of the last part of the prompt in each sequence: (those of each image, others).
        first_last_row: the lowest slot of a last prompt token in the batch.
        stop: slots that have been read as prompt, drafts after it included.
        tokens: the map of a view (``at``); None for the request itself.
    """

    def __init__(self, layers: int = 0, ledger: Ledger | None = None, counts: bool = False) -> None:
        self.ledger, self.counts = ledger or Ledger(), counts
        self.call: object = None
        self.batch: int | None = None
        self.prompt_length = 0
        self.has_padding = False
        self._stores: dict[tuple[Hashable, int | None], Store] = {}
        self._ids = Slots(-1, torch.int64)
        self._roles = Slots(ANSWER, torch.uint8)
        self._turns = Slots(-1, torch.int16)
        self.ids_known = self.turns_known = False
        self._finder: RoleFinder | None = None
        self._types = Slots(TEXT, torch.uint8)
        self._images = Slots(-1, torch.int16)
        self._real = Slots(True, torch.bool)
        self._runs: tuple[tuple[int, int, bool, bool], ...] = ()
        self._last_prompt_row: Tensor | None = None
        self._first_row_after_image = 0
        self._with_image: Tensor | None = None
        self.first_last_row = self.stop = 0
        self.maps: list[TokenMap | None] = [None] * layers
        self.newest: tuple[tuple[tuple[int, ...], int], ...] = ()
        self.tokens: TokenMap | None = None
        self._window: tuple[tuple[Any, ...], TokenMap] | None = None
        self._whole: Request | None = None
        self._views: list[Request] = []  # no dict: compiled graphs would watch the order of its keys
        self._picked: dict[str, Slots] = {}
        self._surveyed = False

    def extend(
        self,
        start: int,
        types: Tensor,
        images: Tensor,
        real: Tensor | None,
        prompt_length: int | None,
        ids: Tensor | None = None,
    ) -> None:
        """Read new prompt tokens that enter the cache at slot ``start``.

        Args:
            types: uint8 ``[batch, new]`` of TEXT, IMAGE, VIDEO.
            images: int ``[batch, new]``, which image of its row a token belongs to, -1 for text.
            real: bool ``[batch, start + new or more]``, False for padding; None = no padding.
            prompt_length: slots of the whole prompt when generate() said so, else all tokens given so far.
            ids: token ids ``[batch, new]``; None when the model got embeddings.
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
        types, real = self._survey(stop)
        if self.counts:
            new = slice(start, stop)
            visual = ((types != TEXT) & real)[:, new]
            numbers = self._images.read(stop, visual.device)[:, new]
            sizes = [
                torch.unique(row[seen], return_counts=True)[1].tolist()
                for row, seen in zip(numbers, visual, strict=True)
            ]
            text = (real[:, new].sum(1) - visual.sum(1)).tolist()
            self.newest = tuple((tuple(images), other) for images, other in zip(sizes, text, strict=True))
            self._views = []
        self._ids.write(start, images.new_full(images.shape, -1) if ids is None else ids.masked_fill(generated, -1))
        self.ids_known = ids is not None

    def _survey(self, stop: int) -> tuple[Tensor, Tensor]:
        """One look from the host per prompt, at types and reality of its slots: what it finds decides shapes."""
        host, self.stop, self._surveyed = torch.device("cpu"), stop, True
        types, real = self._slots("_types").read(stop, host), self._slots("_real").read(stop, host)
        self.has_padding = not bool(real.all())
        slots = torch.arange(stop)
        in_prompt = real & (slots < self.prompt_length)
        last = torch.where(in_prompt, slots, -1).amax(1)
        self._last_prompt_row, self.first_last_row = last, max(int(last.min()), 0)
        visual = (types != TEXT) & real
        after = (types == TEXT) & (visual.cumsum(1) > 0)
        self._first_row_after_image = int(torch.where(after, slots, stop).min())
        self._with_image = None if bool(visual.any(1).all()) else visual.any(1)
        self._runs = _column_runs((types == TEXT).any(0), (types != TEXT).any(0))
        return types, real

    def at(self, tokens: TokenMap, in_prompt: bool = True) -> Request:
        """The request in the slots of layers that go on with some of the tokens.

        ``in_prompt`` False leaves out what only prompt rows ask for and what takes a look from the host.
        """
        if self._whole is not None:
            return self._whole.at(tokens, in_prompt)
        view = next((view for view in self._views if view.tokens is tokens), None)
        if view is None:
            view = Request(len(self.maps), self.ledger, self.counts)
            view.__dict__.update(self.__dict__)  # shares what methods keep
            view._whole, view._window = self, None
            view.prompt_length, view.tokens, view._picked = self.prompt_length - tokens.removed, tokens, {}
            view.has_padding, view._surveyed = self.has_padding or tokens.valid is not None, False
            if self._last_prompt_row is not None:
                view._last_prompt_row = self._last_prompt_row - tokens.removed
            view.first_last_row = max(self.first_last_row - tokens.removed, 0)
            self._views.append(view)
        if in_prompt and not view._surveyed:
            view._survey(self.stop - tokens.removed)
        return view

    def windowed(self, first: int, device: torch.device) -> TokenMap:
        """The slots of this view from ``first`` on, which are all that a layer with a sliding window has left."""
        wanted, known = (first, self.batch or 1, self.stop, self.tokens), self._window
        if known is None or known[0] != wanted:
            if known is not None:
                self._views[:] = [view for view in self._views if view.tokens is not known[1]]
            if self.tokens is None:
                tokens = TokenMap.window(wanted[1], first, max(first, self.stop), device)
            else:
                tokens = self.tokens.behind(first)
            self._window = known = wanted, tokens
        return known[1]

    def _slots(self, name: str) -> Slots:
        """Slots of the prompt; a view picks its own when they are asked for."""
        kept: Slots = getattr(self, name)
        if self.tokens is None:
            return kept
        if name not in self._picked:
            self._picked[name] = kept.picked(self.tokens.slots, self.tokens.length)
            if name == "_real" and self.tokens.valid is not None:
                self._picked[name].hide(~self.tokens.valid)
        return self._picked[name]

    def store(self, method: Hashable, layer: int | None = None) -> Store:
        """What ``method`` keeps about this prompt, or about one layer of it. A view shares it.

        Slots of a layer's store are those of the layer's cache, slots of the prompt's are original ones (``read``,
        ``write``).
        """
        key = (method, layer)
        if key not in self._stores:
            self._stores[key] = Store()
        return self._stores[key]

    def evict(self, layer: int, tokens: TokenMap, order: Tensor, keys: int) -> None:
        """A layer goes on with the slots ``order`` ``[batch, kept]`` of the ``keys`` it had, which ``tokens`` maps.

        What methods keep by slot of that layer goes along.
        """
        if (before := self.maps[layer]) is not None and before not in (*self.maps[:layer], *self.maps[layer + 1 :]):
            self._views[:] = [view for view in self._views if view.tokens is not before]
        self.maps[layer] = tokens
        for (_, of), store in self._stores.items():
            if of == layer:
                store.evict(order, keys)

    def of_layer(self, layer: int) -> Request:
        """The request in the slots of a layer."""
        tokens = self.maps[layer]
        return self if tokens is None else self.at(tokens)

    def read(self, kept: Slots, keys: int, device: torch.device) -> Tensor:
        """What a method keeps by original slot, in the slots of this view: ``[batch, keys]``."""
        return (kept if self.tokens is None else kept.picked(self.tokens.slots, self.tokens.length)).read(keys, device)

    def write(self, kept: Slots, values: Tensor) -> None:
        """Keep values ``[batch, keys]`` of this view by original slot."""
        kept.write(0, values if self.tokens is None else self.tokens.spread(values, kept.fill))

    def rows_of_prompt(self, start: int, stop: int, device: torch.device) -> Kept:
        """All rows of the newest part of the prompt."""
        slots = torch.arange(start, stop, device=device).expand(self.batch or 1, -1)
        real = self.real(stop, device)
        return Kept(slots, None if real is None else real[:, start:], tuple(sum(images) for images, _ in self.newest))

    def find_turns(self, finder: RoleFinder, needed_by: str = "") -> None:
        """Find the user's turns in what was read so far; ``needed_by`` names methods that cannot do without.

        Raises:
            InputError: turns are needed and there are no token ids, or a row without a user's turn.
        """
        if not self.ids_known:
            if not needed_by:
                return
            raise InputError(
                f"{needed_by} must know the user's turns, which need input_ids; the model got inputs_embeds"
            )
        stop, host = self.stop, torch.device("cpu")
        ids, types, real = (slots.read(stop, host) for slots in (self._ids, self._types, self._real))
        roles, turns = finder.roles(ids, types, real)
        lost = (~(turns >= 0).any(1)).nonzero().flatten().tolist()
        if lost and needed_by:
            raise InputError(
                f"{needed_by} must know the user's turn, and row {lost[0]} of the prompt has none: {finder} not found;"
                " make prompts with processor.apply_chat_template"
            )
        generated = torch.arange(stop) >= self.prompt_length
        self._roles.write(0, roles.masked_fill(generated, ANSWER))
        self._turns.write(0, turns.masked_fill(generated, -1))
        self.turns_known, self._finder = True, finder

    def moved(self, rows: Tensor | None = None, shift: int = 0, hidden: Tensor | None = None) -> Request:
        """A copy for a cache in which row i is what ``rows[i]`` was and every slot lies ``shift`` later.

        The slots before count as padding, and so does ``hidden``, bool ``[batch, slots]``, in slots of this request.
        """
        copy = Request(len(self.maps), self.ledger, self.counts)
        copy.__dict__.update(self.__dict__)
        copy.prompt_length += shift
        copy._first_row_after_image += shift
        copy.first_last_row += shift
        copy._runs = tuple((a + shift, b + shift, text, image) for a, b, text, image in self._runs)
        for name in _SLOTS:
            setattr(copy, name, getattr(self, name).moved(rows, shift))
        copy._stores = {key: store.moved(rows, shift) for key, store in self._stores.items()}
        if self._last_prompt_row is not None:
            copy._last_prompt_row = of_rows(self._last_prompt_row, rows) + shift
        if self._with_image is not None:
            copy._with_image = of_rows(self._with_image, rows)
        copy._views, copy._window = [], None
        if rows is not None:
            copy.batch, copy.maps = len(rows), list(self.maps)
            copy._move_maps(rows)
            copy.newest = tuple(self.newest[row] for row in rows.tolist()) if self.newest else ()
        if shift or hidden is not None:
            copy.has_padding = True
            real = self._real.read(self.prompt_length, torch.device("cpu"))
            if hidden is not None:
                real = real & ~hidden[:, : self.prompt_length].cpu()
            copy._real.write(0, of_rows(torch.nn.functional.pad(real, (shift, 0), value=False), rows))
        return copy

    def reorder(self, rows: Tensor) -> None:
        """Let every row's state become what row ``rows`` ``[batch]`` had (beam search); beams share their prompt."""
        for store in self._stores.values():
            store.reorder(rows)
        if any(tokens is not None and tokens.by_eviction for tokens in self.maps):  # beams evict for themselves
            self._move_maps(rows)

    def _move_maps(self, rows: Tensor) -> None:
        moved = {tokens: tokens.moved(rows) for tokens in self.maps if tokens is not None}  # layers share them
        self.maps[:] = [tokens and moved[tokens] for tokens in self.maps]
        self._views.clear()

    @property
    def has_images(self) -> bool:
        return any(image for _, _, _, image in self._runs)

    def types(self, keys: int, device: torch.device) -> Tensor:
        """uint8 ``[batch, keys]``: TEXT, IMAGE or VIDEO; generated tokens are TEXT."""
        return self._slots("_types").read(keys, device)

    def images(self, keys: int, device: torch.device) -> Tensor:
        """int16 ``[batch, keys]``: number of the image within its row, -1 for text."""
        return self._slots("_images").read(keys, device)

    def ids(self, keys: int, device: torch.device) -> Tensor:
        """int64 ``[batch, keys]``: token ids of the prompt, -1 where they are not known and for generated tokens."""
        return self._slots("_ids").read(keys, device)

    def roles(self, keys: int, device: torch.device) -> Tensor:
        """uint8 ``[batch, keys]``: SYSTEM, USER, MARKER or ANSWER; for methods that ask for turns."""
        return self._slots("_roles").read(keys, device)

    def turns(self, keys: int, device: torch.device) -> Tensor:
        """int16 ``[batch, keys]``: number of the user's turn that a token belongs to, -1 elsewhere."""
        return self._slots("_turns").read(keys, device)

    def content(self, keys: int, device: torch.device) -> Tensor:
        """bool ``[batch, keys]``: tokens of content words that a user said; for methods that ask for turns."""
        if self._finder is None:
            raise InputError("content words were asked for before the turns were found")
        host = torch.device("cpu")
        roles = self.roles(keys, host).masked_fill(self.types(keys, host) != TEXT, SYSTEM)
        return self._finder.content(self.ids(keys, host), roles).to(device)

    def real(self, keys: int, device: torch.device) -> Tensor | None:
        """bool ``[batch, keys]``, False for padding; None when there is none."""
        return self._slots("_real").read(keys, device) if self.has_padding else None

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
        return Rows(after[:, start:], min(max(self._first_row_after_image - start, 0), queries))

    def generated_row_after_image(self, device: torch.device) -> Rows | None:
        """The one generated row of each sequence that has an image; None if all have one."""
        return None if self._with_image is None else Rows(self._with_image[:, None].to(device))

    def rows_that_predict(self, start: int, queries: int, device: torch.device) -> Rows:
        """The last prompt row of each sequence and every row generated after it."""
        slots = torch.arange(start, start + queries, device=device)
        return Rows(slots >= self.last_prompt_row(device)[:, None], min(max(self.first_last_row - start, 0), queries))


def _column_runs(text: Tensor, image: Tensor) -> tuple[tuple[int, int, bool, bool], ...]:
    """Runs of columns (start, stop, some row has text here, some row has an image here)."""
    kinds = (text.int() + 2 * image.int()).tolist()
    cuts = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    return tuple((a, b, bool(kinds[a] & 1), bool(kinds[a] & 2)) for a, b in pairwise(cuts) if a < b)
