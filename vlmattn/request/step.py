"""One forward of the model for a request."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlmattn.kernels import Visibility
from vlmattn.request.callbacks import Watch
from vlmattn.request.prefill import SideStream
from vlmattn.request.request import Request
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
