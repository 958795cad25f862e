"""How attention adds up over the layers of a prompt: rollout, and maximum flow (arXiv 2005.00928)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from vlmattn.errors import InputError, OptionError, UnsupportedError
from vlmattn.inspection.looking import prompt_of, watched
from vlmattn.inspection.measuring import Inputs
from vlmattn.inspection.named import Named
from vlmattn.inspection.recorder import head_gains
from vlmattn.kernels import AttentionEdit
from vlmattn.request import LayerContext, Step, Weights, number_images
from vlmattn.wrapping import record_of

_CHUNK = 2**22  # scores held at once: 16 MB
_EDGES = 500_000  # of a flow graph: 0.5 GB and 10 s to build, 1 to 3 s for each key
_UNIT = 2**40  # capacities are whole numbers of 1 / _UNIT: with floats, rests of rounding would be paths of their own

Use = Callable[[int, Tensor], None]
"""``use(start, rows)`` gets A' of one layer after another, rows from ``start`` on: float32 ``[row, key]``."""


def rollout(
    model: PreTrainedModel, inputs: Inputs, recipe: Any = None, *, residual: float = 0.5, processor: Any = None
) -> Named:
    """Attention rollout of a prompt, ``[query, key]``: the share of each input token in each row after the last layer.

        R = A'_L ... A'_1,   A'_l = (1 - residual) mean_h eta_h A_lh + residual I,   each row of A' divided by its sum

    A is attention as the layers used it, under the recipe after masks, changed scores and group gains; eta are its
    gains of whole heads (1 without). Decoding rules have no part in it. Rows of R sum to 1.

    One forward, and attention of all rows once more, some rows of one layer at a time: two matrices of query x key are
    held, whatever the depth (4,096 tokens: 0.13 GB).

    Args:
        inputs: what the processor made of one prompt with images, without padding.
        recipe: what acts meanwhile, as for ``wrap``; None = what is on the model, or nothing.
        residual: share of the residual stream in each layer, 0 to 1 (paper: 0.5).
        processor: for recipes that must know the user's turn.

    Raises:
        OptionError: residual outside 0..1.
        InputError: several prompts, padding, no image tokens.
        UnsupportedError: a family or an attention implementation that is not supported, layers without attention over
            the tokens, a recipe that drops tokens or is about cached ones.
    """
    before, after = torch.empty(0), torch.empty(0)

    def add(start: int, rows: Tensor) -> None:
        nonlocal before, after
        if not start:
            before, after = after, rows.new_zeros(rows.shape[1], rows.shape[1])
        if len(before):  # causal rows end early: a third of the work
            seen = _width(rows)
            wide = _width(before[:seen])
            rows = rows[:, :seen].to(before.device) @ before[:seen, :wide]
        after[start : start + len(rows), : rows.shape[1]] = rows

    _each_layer(model, inputs, recipe, residual, processor, add)
    return Named(after.cpu(), ("query", "key"))


def _width(rows: Tensor) -> int:
    """Columns up to the last that is not 0 everywhere, at least 1."""
    return int(rows.any(0).long().cumsum(0).argmax()) + 1


def attention_flow(
    model: PreTrainedModel,
    inputs: Inputs,
    row: int = -1,
    recipe: Any = None,
    *,
    keys: Sequence[int] | None = None,
    residual: float = 0.5,
    layers: int | None = None,
    merge: int = 1,
    processor: Any = None,
    progress: bool = True,
) -> Named:
    """Maximum flow of attention from one row after the last layer to each input token, ``[key]``, 0 to 1.

    The graph has a node for each layer and token; the edge from (l, i) to (l - 1, j) has the capacity A'_l[i, j] of
    ``rollout``. Each key is a sink of its own, so each costs one maximum flow (networkx, shortest augmenting paths) in
    a graph of about layers x tokens^2 / 2 edges. On one CPU core 30 layers and 70 tokens take 20 s for all keys; the
    largest graph that is allowed (500,000 edges) takes 10 s and 0.5 GB to build, then 1 to 3 s a key. A causal row has
    more ways to an early token than to a late one, and a higher flow from it.

    Args:
        row: by token of the prompt (from the end below 0).
        keys: input tokens to measure; None = all.
        layers: only the last so many, whose input then stands for the prompt's tokens; None = all.
        merge: so many neighbouring tokens of an image count as one node (text tokens stay apart). Its capacities are
            mean over rows and sum over keys, so rows still sum to 1; its flow is given for each of its tokens.
        progress: show a bar.
        inputs, recipe, residual, processor: as for ``rollout``.

    Returns:
        0 for keys that the row cannot reach, nan for those not asked for.

    Raises:
        InputError: a row or key that is not in the prompt, a graph that is too large (says how large, and what to do).
        OptionError: layers or merge out of range.
        OptionError, InputError, UnsupportedError: also as for ``rollout``.
    """
    family, given, types = prompt_of(model, inputs)
    anatomy, tokens = family.anatomy(model), types.shape[1]
    for place in (row, *(keys or ())):
        if not -tokens <= place < tokens:
            raise InputError(f"token {place} is out of range: the prompt has {tokens} (0 to {tokens - 1})")
    if layers is not None and not 1 <= layers <= anatomy.layers:
        raise OptionError(f"layers must be within 1..{anatomy.layers}, got {layers}")
    if merge < 1:
        raise OptionError(f"merge must be at least 1, got {merge}")
    nodes = _nodes(number_images(types, family.image_lengths(model, given))[0].tolist(), merge)
    depth, count = layers or anatomy.layers, int(nodes[-1]) + 1
    _check_size(depth, count, anatomy.causal)
    merged = _Merged(nodes, depth)
    _each_layer(model, inputs, recipe, residual, processor, merged.add)
    wanted = range(tokens) if keys is None else [key % tokens for key in keys]
    flows = _flows(merged.capacities, int(nodes[row]), sorted({int(nodes[key]) for key in wanted}), progress)
    flow = torch.full((tokens,), float("nan"))
    for key in wanted:
        flow[key] = flows[int(nodes[key])]
    return Named(flow, ("key",))


def _check_size(layers: int, nodes: int, causal: bool) -> None:
    edges = layers * (nodes * (nodes + 1) // 2 if causal else nodes**2)
    if edges > _EDGES:
        raise InputError(
            f"the flow graph would have {edges:,} edges ({layers} layers, {nodes} nodes; at most {_EDGES:,}); give"
            " merge= (image tokens that count as one) or layers=, or use rollout"
        )


class _Merged:
    """Capacities ``[node, node]`` of the last ``depth`` layers, from A' of all layers and the node of each token."""

    def __init__(self, nodes: Tensor, depth: int) -> None:
        self.capacities: deque[Tensor] = deque(maxlen=depth)
        self._nodes, self._sizes = nodes, nodes.bincount()

    def add(self, start: int, rows: Tensor) -> None:
        """What the next rows of a layer add (``Use``)."""
        count = len(self._sizes)
        if not start:
            self.capacities.append(torch.zeros(count, count))
        own = self._nodes[start : start + len(rows)]
        merged = torch.zeros(len(rows), count).index_add_(1, self._nodes, rows.cpu())
        self.capacities[-1].index_add_(0, own, merged / self._sizes[own, None])


def _flows(capacities: Sequence[Tensor], node: int, targets: Sequence[int], progress: bool) -> dict[int, float]:
    """Maximum flow from a node after the last layer to each of some input nodes, through capacities of each layer."""
    from networkx.algorithms.flow import build_residual_network, maximum_flow_value, shortest_augmenting_path

    source = (len(capacities), node)
    graph = _graph(capacities, source)
    residue = build_residual_network(graph, "capacity")  # once: every flow begins by clearing it
    flows = dict.fromkeys(targets, 0.0)
    for target in tqdm(targets, desc="flow", unit="key", disable=not progress):
        if (0, target) in graph:
            found = maximum_flow_value(graph, source, (0, target), flow_func=shortest_augmenting_path, residual=residue)
            flows[target] = found / _UNIT
    return flows


def _nodes(images: Sequence[int], merge: int) -> Tensor:
    """The node of each token, int64 ``[token]``, from the number of its image (-1 for text)."""
    nodes, node, size, before = [], -1, 0, -1
    for image in images:
        size = size + 1 if image >= 0 and image == before and size < merge else 1
        node, before = node + (size == 1), image
        nodes.append(node)
    return torch.tensor(nodes)


def _graph(capacities: Sequence[Tensor], source: tuple[int, int]) -> Any:
    """What can be reached from ``source`` = (layers, node) through capacities ``[node, node]`` of each layer."""
    import networkx

    graph = networkx.DiGraph()
    graph.add_node(source)
    reached = torch.zeros(len(capacities[0]), dtype=torch.bool)
    reached[source[1]] = True
    for layer in reversed(range(len(capacities))):
        whole = (capacities[layer].double() * reached[:, None] * _UNIT).round().long()
        queries, keys = whole.nonzero(as_tuple=True)
        for query, key, capacity in zip(queries.tolist(), keys.tolist(), whole[queries, keys].tolist(), strict=True):
            graph.add_edge((layer + 1, query), (layer, key), capacity=capacity)
        reached = (whole > 0).any(0)
    return graph


class _Mixed:
    """Hands on A' of each layer, some rows at a time (a ``Watcher``)."""

    def __init__(self, tokens: int, residual: float, use: Use) -> None:
        self._tokens, self._residual, self._use = tokens, residual, use

    def enter(self, step: Step, layer: int, hidden: Tensor) -> None:
        pass

    def attended(self, context: LayerContext, edit: AttentionEdit, weights: Weights) -> None:
        tokens = self._tokens
        if context.queries != tokens or context.keys != tokens:
            raise UnsupportedError(
                f"'{context.step.recipe}' drops tokens before layer {context.layer}, and attention cannot be"
                " followed through rows that are gone; look shows the rows that are left"
            )
        size = max(1, _CHUNK // (context.heads * tokens))
        for start in range(0, tokens, size):
            stop = min(start + size, tokens)
            found = weights(start, stop)[0]
            if edit.head_gain:
                found *= head_gains(edit.slice_rows(start, stop), context.heads, stop - start, context.device)[
                    ..., None
                ]
            mixed = found.mean(0) * (1 - self._residual)
            mixed.diagonal(start).add_(self._residual)
            self._use(start, mixed / mixed.sum(-1, keepdim=True).clamp_min(1e-30))


def _each_layer(model: PreTrainedModel, inputs: Inputs, recipe: Any, residual: float, processor: Any, use: Use) -> None:
    """Let ``use`` have A' of all layers in one forward of the prompt."""
    if not 0 <= residual <= 1:
        raise OptionError(f"residual must be within 0..1, got {residual:g}")
    family, given, types = prompt_of(model, inputs)
    if family.anatomy(model).attending is not None:
        raise UnsupportedError(
            f"some layers of {type(model).__name__} have no attention over the tokens, so it cannot be followed through"
            " them; look shows the other layers"
        )
    positions = family.positions(model, given)  # given, so that the model notes none
    with torch.no_grad(), watched(model, processor, recipe, _Mixed(types.shape[1], residual, use)) as name:
        record = record_of(model)
        if record is not None and record.now.acting.policies:
            raise UnsupportedError(
                f"'{name}' changes what an answer sees of the cache, and attention is followed in the prompt;"
                " leave it out"
            )
        model(**given, position_ids=positions, use_cache=False, logits_to_keep=1)
