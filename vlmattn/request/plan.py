"""A recipe bound to one model, and what the engine asks of its methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from vlmattn.kernels import AttentionEdit

if TYPE_CHECKING:
    from vlmattn.request.context import (
        Eviction,
        HeadSplit,
        ImageFeatures,
        KeptTokens,
        LayerContext,
        Prefill,
        PruningStage,
        Step,
    )


class Weights(Protocol):
    """``weights(start, stop)``: unedited attention, float32 ``[batch, heads, stop - start, key]``, of a few query rows."""

    def __call__(self, start: int, stop: int, /, edit: AttentionEdit = ...) -> Tensor:
        """With ``edit``: as it would be under that edit (head gains aside)."""


Watch = Callable[[int, Tensor, Weights], Tensor | None]
"""``watch(layer, out, weights)`` sees head outputs ``[batch, query, heads, dim]`` and may return head gains ``[batch, heads]``."""

Compare = Callable[[int, Tensor, Tensor], Tensor | None]
"""``compare(layer, prompt, beside)`` sees head outputs ``[batch, query, heads, dim]`` of the prompt and of a stream beside it,
both before any head gain, and may return head gains ``[batch, heads]`` for the stream."""


class Looker(Protocol):
    """Who looks at the vision tower and at unedited attention."""

    @property
    def follows_attention(self) -> bool: ...

    def on_image_features(self, sight: ImageFeatures) -> None: ...

    def on_attention(self, context: LayerContext, weights: Weights) -> None: ...


class Method(Looker, Protocol):
    """What the engine asks of a method; ``interventions.base.Intervention`` is the real thing."""

    @property
    def follows_hidden_states(self) -> bool: ...

    def before_prefill(self, prefill: Prefill) -> None: ...

    def on_hidden_states(self, context: LayerContext, hidden: Tensor) -> None: ...

    def edit(self, context: LayerContext) -> AttentionEdit: ...


class Watcher(Protocol):
    """Sees every layer at work and changes nothing; it belongs to no recipe (``Handle.watched``)."""

    def enter(self, step: Step, layer: int, hidden: Tensor) -> None:
        """The residual stream ``[batch, rows, hidden]`` that enters a layer."""

    def attended(self, context: LayerContext, edit: AttentionEdit, weights: Weights) -> None:
        """The edit that was in force in a layer, and attention with it (before head gains)."""


class Pruner(Looker, Protocol):
    """What the engine asks of a method that drops tokens; ``interventions.pruning.Pruning`` is the real thing."""

    @property
    def info(self) -> Any: ...

    @property
    def drops(self) -> bool: ...

    @property
    def compact(self) -> bool: ...

    def on_embeddings(self, stage: PruningStage) -> None: ...

    def choose_tokens(self, stage: PruningStage) -> KeptTokens: ...


class Policy(Method, Protocol):
    """What the engine asks of a method that evicts or reads a part; ``interventions.pruning.KVPolicy`` is the real thing."""

    @property
    def info(self) -> Any: ...

    @property
    def drops(self) -> bool: ...

    def on_queries_keys(self, context: LayerContext, query: Tensor, key: Tensor) -> None: ...

    def evict(self, context: LayerContext) -> Eviction | None: ...

    def split(self, context: LayerContext) -> HeadSplit | None: ...


@runtime_checkable
class Follows(Protocol):
    """State of a method that has one entry for each sequence."""

    def reorder(self, rows: Tensor) -> None: ...

    def moved(self, rows: Tensor | None = None, shift: int = 0) -> Any: ...


class RoleFinder(Protocol):
    """Finds the turns of a prompt (``models.Turns`` is the real thing)."""

    def roles(self, ids: Tensor, types: Tensor, real: Tensor) -> tuple[Tensor, Tensor]: ...

    def content(self, ids: Tensor, roles: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Plan:
    """A recipe bound to one model: which methods act in which layer, and which steps they take part in.

    Attributes:
        by_layer, on_hidden_states, on_attention, on_queries_keys: methods of each layer, by what they implement.
        before_prefill, on_image_features: methods that do so.
        extending: layers whose observers also see generated tokens.
        tower_layers: layers of the vision tower that ``on_image_features`` methods look at.
        turns: who needs to know where the user's turns are; ``uses_turns``: somebody wants to, if it can be known.
        texts: prompts without images are welcome. ``text_first``: so is text that images follow later, on the same cache.
        edits_text: text that no image precedes is edited, or looked at while it is read.
        decoding: branches and rule for this model, if there are some, ``branches``: a plan for each branch.
        branch_names: branches that a call may bring inputs for.
        search: the method that chooses the tokens, if it is not the library. ``rule``: what the report calls either.
        pruning: for each layer the method that chooses which prompt rows reach it, if one does; empty: no layer has one.
        evicting: for each layer the policy that takes slots out of its cache, if one does; empty: no layer has one.
        policies: all methods about cached slots, which must know on the host how far a cache is filled.
        watching: who sees every layer at work.
    """

    name: str
    by_layer: tuple[tuple[Method, ...], ...] = ()
    before_prefill: tuple[Method, ...] = ()
    on_hidden_states: tuple[tuple[Method, ...], ...] = ()
    on_attention: tuple[tuple[Looker, ...], ...] = ()
    on_image_features: tuple[Looker, ...] = ()
    extending: frozenset[int] = frozenset()
    tower_layers: frozenset[int] = frozenset()
    turns: tuple[str, ...] = ()
    uses_turns: bool = False
    texts: bool = False
    text_first: bool = True
    edits_text: bool = False
    decoding: Any = None
    search: Any = None
    rule: str = ""
    branches: tuple[Plan, ...] = ()
    branch_names: tuple[str, ...] = ()
    pruning: tuple[Pruner | None, ...] = ()
    evicting: tuple[Policy | None, ...] = ()
    policies: tuple[Policy, ...] = ()
    on_queries_keys: tuple[tuple[Policy, ...], ...] = ()
    watching: tuple[Watcher, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Nothing happens in the attention of the main prompt."""
        return not any(self.by_layer) and not any(self.on_attention) and not self.pruning and not self.watching

    @property
    def acts(self) -> bool:
        """Anything happens, in attention or to logits."""
        return not self.is_identity or self.decoding is not None or self.search is not None

    @property
    def drops(self) -> bool:
        """Layers may go on with fewer tokens than the prompt has."""
        return bool(self.pruning or self.evicting)
