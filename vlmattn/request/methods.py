"""What the engine asks of methods; `vlmattn.interventions` has the real things."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from vlmattn.kernels import AttentionEdit, ResidualPart
from vlmattn.request.callbacks import Weights
from vlmattn.request.layer_context import LayerContext
from vlmattn.request.prefill import Prefill
from vlmattn.request.pruning import Eviction, HeadSplit, KeptTokens, PruningStage
from vlmattn.request.step import Step
from vlmattn.request.vision import ImageFeatures


class Looker(Protocol):
    """Who looks at unedited attention."""

    @property
    def follows_attention(self) -> bool: ...

    def on_attention(self, context: LayerContext, weights: Weights) -> None: ...


class LookingMethod(Looker, Protocol):
    """A method of a recipe, which may look at the vision tower too."""

    @property
    def info(self) -> Any: ...

    def on_image_features(self, features: ImageFeatures) -> None: ...


class KeyLooker(Protocol):
    """Who looks at queries and keys, in the prompt and in steps."""

    def on_queries_keys(self, context: LayerContext, query: Tensor, key: Tensor) -> None: ...


class Method(LookingMethod, Protocol):
    """What the engine asks of a method; ``interventions.base.Intervention`` is the real thing."""

    @property
    def follows_hidden_states(self) -> bool: ...

    def before_prefill(self, prefill: Prefill) -> None: ...

    def on_hidden_states(self, context: LayerContext, hidden: Tensor) -> None: ...

    def edit(self, context: LayerContext) -> AttentionEdit: ...


class Steerer(LookingMethod, Protocol):
    """A method that changes hidden states; ``interventions.steering.Steering`` is the real thing."""

    @property
    def site(self) -> str: ...

    def residual(self, context: LayerContext) -> tuple[ResidualPart, ...]: ...


class Watcher(Protocol):
    """Sees every layer at work and changes nothing; it belongs to no recipe (``Record.watched``)."""

    def enter(self, step: Step, layer: int, hidden: Tensor) -> None:
        """The residual stream ``[batch, rows, hidden]`` that enters a layer."""

    def attended(self, context: LayerContext, edit: AttentionEdit, weights: Weights) -> None:
        """The edit that was in force in a layer, and attention with it (before head gains)."""


class Pruner(LookingMethod, Protocol):
    """What the engine asks of a method that drops tokens; ``interventions.pruning.Pruning`` is the real thing."""

    @property
    def drops(self) -> bool: ...

    @property
    def compact(self) -> bool: ...

    def on_embeddings(self, stage: PruningStage) -> None: ...

    def choose_tokens(self, stage: PruningStage) -> KeptTokens: ...


class Policy(KeyLooker, Method, Protocol):
    """What the engine asks of a method that evicts or reads a part: of ``interventions.pruning.KVPolicy``."""

    @property
    def drops(self) -> bool: ...

    @property
    def by_head(self) -> bool: ...

    def on_queries_keys(self, context: LayerContext, query: Tensor, key: Tensor) -> None: ...

    def evict(self, context: LayerContext) -> Eviction | None: ...

    def split(self, context: LayerContext) -> HeadSplit | None: ...
