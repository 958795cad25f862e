"""The generate() call in progress: what the hooks of a wrapped model know about it."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.request import Ledger, Plan
from vlmattn.wrapping.record import Record


@dataclass
class TowerView:
    """What was seen of the vision tower in one call: layer -> for each image ``[heads, tokens]``.

    ``keys`` and ``features`` are there for methods that drop tokens: see ``request.Image``.
    ``sizes``: what a forward got about images, pixels aside. ``shown``: the methods have seen it; a tower that runs
    again, as it may in every forward, begins anew.
    """

    patches: dict[int, list[Tensor]] = field(default_factory=dict)
    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    features: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    shown: bool = False


@dataclass(frozen=True)
class Call:
    """One generate() call in progress: its recipe, the length of its prompt, and whether its mask is only padding.

    ``ledger``: where its counts go, whatever recipe is set meanwhile.
    ``token`` is what a request remembers of it (never the record or the model). ``direct`` marks a forward outside of
    generate(), which is only noted while the vision tower is looked at; ``outer`` is the call it may lie in.

    ``ids`` int64 ``[batch, tokens]`` are the tokens that the caller gave, those of a cache from before included.
    ``sizes`` are the caller's inputs about images, pixels aside: a forward does not get them where
    generate() encodes images before. ``given_cache``: the caller gave the cache, and may go on from it.

    With a decoding rule ``branches`` are there. While one of them reads its prompt a call of its own is in progress:
    ``blank`` bool ``[batch, prompt]`` are image tokens whose features are zeroed, ``rope`` the factor on the rotary
    base.
    """

    record: Record
    model: PreTrainedModel
    plan: Plan
    prompt_length: int | None
    plain_mask: bool
    direct: bool = False
    outer: Call | None = None
    branches: Any = None  # ``branches.Branches``
    blank: Tensor | None = None
    rope: float = 1.0
    token: object = field(default_factory=object)
    tower: TowerView = field(default_factory=TowerView)
    ids: Tensor | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    given_cache: bool = False
    ahead: Any = None  # ``ahead.Ahead``, for a prompt that comes in pieces
    ledger: Ledger = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.ledger is None:
            object.__setattr__(self, "ledger", self.record.now.ledger)


# Which generate() call of which model runs in this thread. Only the model's hooks read it, to hand the plan and the
# prompt length to the request; without a cache (use_cache=False) every forward makes a request of its own from it.
CALL: ContextVar[Call | None] = ContextVar("vlmattn_call", default=None)
