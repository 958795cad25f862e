"""A recipe bound to one model: which methods act where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmattn.request.methods import KeyLooker, Looker, LookingMethod, Method, Policy, Pruner, Steerer, Watcher


@dataclass(frozen=True)
class Plan:
    """A recipe bound to one model: which methods act in which layer, and which steps they take part in.

    Attributes:
        by_layer, on_hidden_states, on_attention, on_queries_keys: methods of each layer, by what they implement.
        before_prefill, on_image_features: methods that do so.
        extending: layers whose ``on_hidden_states`` methods also see generated tokens.
        tower_layers: layers of the vision tower that ``on_image_features`` methods look at.
        turns: who needs to know where the user's turns are; ``uses_turns``: somebody wants to, if it can be known.
        texts: prompts without images are welcome. ``text_first``: so is text that images follow later, on the same
            cache.
        edits_text: text that no image precedes is edited, or looked at while it is read.
        decoding: branches and rule for this model, if there are some, ``branches``: a plan for each branch.
        branch_names: branches that a call may bring inputs for.
        search: the method that chooses the tokens, if it is not the library. ``rule``: what the report calls either.
        pruning: for each layer the method that chooses which prompt rows reach it, if one does; empty: no layer has
            one.
        evicting: for each layer the policy that takes slots out of its cache, if one does; empty: no layer has one.
        policies: all methods about cached slots, which must know on the host how far a cache is filled.
        cross: layers of cross-attention, whose keys are images: ``image_keys`` for each.
        sources: the layer whose keys each layer attends with; empty: its own.
        steering: for each layer the methods that change its hidden states; empty if none does.
        watching: who sees every layer at work.
    """

    name: str
    by_layer: tuple[tuple[Method, ...], ...] = ()
    before_prefill: tuple[Method, ...] = ()
    on_hidden_states: tuple[tuple[Method, ...], ...] = ()
    on_attention: tuple[tuple[Looker, ...], ...] = ()
    on_image_features: tuple[LookingMethod, ...] = ()
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
    on_queries_keys: tuple[tuple[KeyLooker, ...], ...] = ()
    cross: frozenset[int] = frozenset()
    image_keys: int = 0
    sources: tuple[int, ...] = ()
    steering: tuple[tuple[Steerer, ...], ...] = ()
    watching: tuple[Watcher, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Nothing happens in the layers that read the main prompt."""
        acting = any(self.by_layer) or any(self.on_attention) or self.pruning or self.steering or self.watching
        return not acting

    @property
    def acts(self) -> bool:
        """Anything happens, in attention or to logits."""
        return not self.is_identity or self.decoding is not None or self.search is not None

    @property
    def drops(self) -> bool:
        """Layers may go on with fewer tokens than the prompt has."""
        return bool(self.pruning or self.evicting)


#: The bare model answers.
NO_PLAN = Plan("none")
