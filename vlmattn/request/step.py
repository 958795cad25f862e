"""One forward of the model for one request."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vlmattn.kernels import Visibility
from vlmattn.request.request import Request
from vlmattn.request.token_map import Kept, TokenMap


@dataclass(eq=False)
class Step:
    """One forward of the model for a request.

    Attributes:
        base: name of the attention implementation the model had before it was wrapped.
        start: cache slot of the first query row; None in single-token decoding, where nothing needs it.
        plain_mask: the mask can only be causal and padding (no mask from the user).
        recipe: its name, for messages.
        slot, capacity: where the one new token goes (a tensor with a static cache of that many slots), for methods that
            follow generated tokens too.
        tower: what was seen of each encoded image in the vision tower.
        order: which encoded image each image of the prompt is (beams repeat them); None = by the rows they are in.
        seen: what one query row sees of so many keys, as the last layer had it.
        rows: prompt rows that are still there; None = all.
        rotary: makes cosines and sines of positions for a layer, for methods that count positions anew.
        tables: rotary tables of all tokens in the last layer with attention, and which layer that was.
        passed: slots that the layer's sliding window has left behind.
        wants_weights: the caller of the model asked for attention weights.
    """

    request: Request
    base: str
    start: int | None
    plain_mask: bool = True
    recipe: str = ""
    slot: int | Tensor | None = None
    capacity: int = 0
    tower: Any = None
    order: list[int] | None = None
    seen: tuple[int, Visibility] | None = None
    rows: Kept | None = None
    rotary: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None
    tables: tuple[int, Any] | None = None
    passed: int = 0
    wants_weights: bool = False
    _memo: dict[Hashable, Any] = field(default_factory=dict)
    _whole: Step | None = None

    @property
    def is_prompt(self) -> bool:
        """Prompt tokens are being read (not one new token after another, not the draft of assisted decoding)."""
        return self.start is not None and self.start < self.request.prompt_length

    def through(self, tokens: TokenMap | None) -> Step:
        """This step as layers see it that go on with some of the tokens."""
        if tokens is None:
            return self
        if self._whole is not None:
            return self._whole.through(tokens)

        def make() -> Step:
            start = None if self.start is None else tokens.slot(self.start)
            slot = None if self.slot is None else self.slot - tokens.removed
            request = self.request.at(tokens, self.is_prompt)
            return replace(self, request=request, start=start, slot=slot, seen=None, _memo={}, _whole=self)

        step: Step = self.memo(("through", tokens), make)
        return step

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A value that all layers of this step share."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def memo_of(self, given: Any, key: Hashable, make: Callable[[], Any]) -> Any:
        """A value that all layers share which the library gives the same object."""
        known: list[tuple[Any, Any]] = self.memo(key, list)
        found = next((value for object_, value in known if object_ is given), None)
        if found is None:
            found = make()
            known.append((given, found))
        return found
