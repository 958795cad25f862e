"""One forward of the model: which rows belong to which request, and what acts on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vlmattn.request.callbacks import States, Watch, Weights
from vlmattn.request.plan import NO_PLAN, Plan
from vlmattn.request.prefill import SideStream
from vlmattn.request.request import Request
from vlmattn.request.step import Step


@dataclass(eq=False)
class Part:
    """Rows of a forward that belong to one request.

    Attributes:
        rows: of the batch; step: their step, None = nothing acts on them.
        plan: which methods act.
        watch: sees what attention does in a pass of preparation or beside a prompt, where no edit runs; states: sees
            what layers put out there.
        streams: other inputs that accompany this prompt.
        noted: text that the bare model reads, and which rides on the cache for what follows.
    """

    rows: slice = field(default_factory=lambda: slice(None))
    step: Step | None = None
    plan: Plan = NO_PLAN
    watch: Watch | None = None
    states: States | None = None
    streams: tuple[SideStream, ...] = ()
    noted: Request | None = None

    @property
    def acting(self) -> Step | None:
        """The step whose methods act; None in rows without edits and where somebody only watches."""
        return self.step if self.watch is None else None


@dataclass(eq=False)
class Forward:
    """One forward of the model over parts with requests of their own: one, or more with a rule's branches.

    Attributes:
        parts: in the order of their rows.
        early: layer -> the residual stream that enters it, noted for layers that are keys here.
        blank: bool ``[batch, query]``, tokens whose embeddings are zeroed.
        branches: what the parts' logits become; None while a prompt is read, and without a decoding rule.
        ahead: takes the attention weights of a layer that has not run yet, and ends it by raising; past: the keys that
            the layer has from before, ``[batch, kv_heads, key, dim]``.
    """

    parts: tuple[Part, ...] = (Part(),)
    early: dict[int, Tensor | None] = field(default_factory=dict)
    blank: Tensor | None = None
    branches: Any = None
    ahead: Callable[[Weights], None] | None = None
    past: Tensor | None = None

    @property
    def main(self) -> Part:
        """The rows of the prompt itself."""
        return self.parts[0]

    def at(self, step: Step) -> Forward:
        """This forward, of one part, as a layer sees it that goes on with some of the tokens."""
        found: Forward = step.memo("forward", lambda: replace(self, parts=(replace(self.main, step=step),)))
        return found


#: A forward in which nothing acts.
BARE = Forward()
