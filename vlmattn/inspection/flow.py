"""How attention adds up over the layers: rollout, and maximum flow (arXiv 2005.00928)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from vlmattn.errors import InputError, OptionError, UnsupportedError
from vlmattn.inspection.looking import watched
from vlmattn.inspection.measuring import Inputs, prepared_one
from vlmattn.inspection.named import Named
from vlmattn.kernels import AttentionEdit
from vlmattn.models import find_family
from vlmattn.request import Scope, Step, Weights

_CHUNK = 2**25  # scores held at once: 128 MB
_EDGES = 500_000  # of a flow graph: a maximum flow to one key takes seconds at that size


@torch.no_grad()
def rollout(model: PreTrainedModel, inputs: Inputs, recipe: Any = None, *, residual: float = 0.5) -> Named:
    """Attention rollout of a prompt, ``[query, key]``: what of each input token is in each row after the last layer.

        R = A'_L ... A'_1,   A'_l = (1 - residual) mean_h A_l + residual I

    Holds three matrices of query x key, whatever the depth. Rows sum to 1 where attention does.

    Args:
        inputs: what the processor made of one prompt, without padding.
        recipe: what acts meanwhile; None = what is on the model, or nothing.
        residual: share of the residual stream in each layer (paper: 0.5).

    Raises:
        OptionError: residual outside 0..1.
        InputError: several prompts, or padding.
        UnsupportedError: a model or recipe that is not supported, or a recipe that drops tokens.
    """
    rolled: list[Tensor] = []

    def add(attention: Tensor) -> None:
        mixed = _mixed(attention, residual)
        rolled[:] = [mixed @ rolled[0] if rolled else mixed]

    _each_layer(model, inputs, recipe, residual, add)
    return Named(rolled[0], ("query", "key"))


@torch.no_grad()
def attention_flow(
    model: PreTrainedModel,
    inputs: Inputs,
    row: int = -1,
    recipe: Any = None,
    *,
    keys: Sequence[int] | None = None,
    residual: float = 0.5,
    layers: int | None = None,
    progress: bool = True,
) -> Named:
    """Maximum flow of attention from one row after the last layer to input tokens, ``[key]``; 0 for keys not asked for.

    A node for each token and layer; the edge from (l, i) to (l - 1, j) has capacity A'_l[i, j] of ``rollout``. Each key is a
    sink of its own, so each costs one maximum flow on a graph of about layers x tokens^2 / 2 edges (networkx): 0.1 s at 10,000
    edges. Early tokens have many ways to every row, so under causal attention their flow is often close to 1.

    Args:
        row: by token of the prompt (from the end below 0).
        keys: input tokens to measure; None = all that the row may see.
        layers: only the last so many; None = all.
        progress: show a bar.
        inputs, recipe, residual: as for ``rollout``.

    Raises:
        InputError: a row or key that is not in the prompt; a graph that is too large (says how large).
        OptionError, UnsupportedError: as for ``rollout``.
    """
    import networkx
    from networkx.algorithms.flow import boykov_kolmogorov

    tokens = prepared_one(model, inputs)["input_ids"].shape[1]
    for place in (row, *(keys or ())):
        if not -tokens <= place < tokens:
            raise InputError(f"token {place} is out of range: the prompt has {tokens} (0 to {tokens - 1})")
    row %= tokens
    total = model.config.get_text_config().num_hidden_layers
    if layers is not None and not 1 <= layers <= total:
        raise OptionError(f"layers must be within 1..{total}, got {layers}")
    depth = layers or total
    if (edges := depth * (row + 1) * (row + 2) // 2) > _EDGES:
        raise InputError(
            f"the flow graph would have {edges:,} edges ({depth} layers, {row + 1} tokens; at most {_EDGES:,}); give"
            " layers=, an earlier row, or use rollout"
        )
    mixed: deque[Tensor] = deque(maxlen=depth)
    _each_layer(model, inputs, recipe, residual, lambda attention: mixed.append(_mixed(attention, residual)))
    ahead = any(bool(capacity.triu(1).any()) for capacity in mixed)  # then later tokens lie on the way
    stop = tokens if ahead else row + 1
    wanted = range(stop) if keys is None else [key % tokens for key in keys]
    graph = networkx.DiGraph()
    for layer, capacity in enumerate(mixed):
        for query, key in (capacity[:stop, :stop] > 0).nonzero().tolist():
            graph.add_edge((layer + 1, query), (layer, key), capacity=float(capacity[query, key]))
    flow = torch.zeros(tokens)
    for key in tqdm(wanted, desc="flow", unit="key", disable=not progress):
        if (0, key) in graph:
            flow[key] = networkx.maximum_flow_value(graph, (len(mixed), row), (0, key), flow_func=boykov_kolmogorov)
    return Named(flow, ("key",))


def _mixed(attention: Tensor, residual: float) -> Tensor:
    """Attention with the share of the residual stream."""
    return (attention * (1 - residual)).add_(torch.eye(len(attention)), alpha=residual)


class _Layers:
    """Hands on the mean over heads of each layer's attention, ``[query, key]`` (a ``Watcher``)."""

    def __init__(self, use: Callable[[Tensor], None]) -> None:
        self._use = use

    def enter(self, step: Step, layer: int, hidden: Tensor) -> None:
        pass

    def attended(self, scope: Scope, edit: AttentionEdit, weights: Weights) -> None:
        if scope.keys != scope.queries:
            raise UnsupportedError(
                "a recipe that drops tokens, or a sliding window, leaves no square of attention to follow"
            )
        found, rows = torch.zeros(scope.queries, scope.keys), max(1, _CHUNK // (scope.heads * scope.keys))
        for start in range(0, scope.queries, rows):
            stop = min(start + rows, scope.queries)
            found[start:stop] = weights(start, stop)[0].mean(0).float().cpu()
        self._use(found)


def _each_layer(
    model: PreTrainedModel, inputs: Inputs, recipe: Any, residual: float, use: Callable[[Tensor], None]
) -> None:
    """Let ``use`` have the head mean of attention of one layer after another."""
    if not 0 <= residual <= 1:
        raise OptionError(f"residual must be within 0..1, got {residual:g}")
    if find_family(model).anatomy(model).attending is not None:
        raise UnsupportedError(
            f"some layers of {type(model).__name__} have no attention over the tokens, so it cannot be followed through them"
        )
    given, sizes = prepared_one(model, inputs), set()

    def checked(attention: Tensor) -> None:
        sizes.add(len(attention))
        if len(sizes) > 1:
            raise UnsupportedError("a recipe that drops tokens leaves layers of different sizes; look shows those rows")
        use(attention)

    with watched(model, None, recipe, _Layers(checked)):
        model(**given, use_cache=False, logits_to_keep=1)
