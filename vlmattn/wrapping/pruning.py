"""Fewer tokens from a layer on: what a decoder layer gets of a forward whose request drops prompt tokens.

The library goes on in original slots: it gives every layer the masks, position ids and rotary tables of all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vlmattn import compat
from vlmattn.attention import FORWARD, refusal_of_apart
from vlmattn.errors import InputError, StateError, UnsupportedError
from vlmattn.kernels import NO_EDIT, AttentionEdit
from vlmattn.models import OF_TOKENS
from vlmattn.request import TEXT, Forward, KeptTokens, Plan, PruningStage, Request, Step, TokenMap, Weights
from vlmattn.wrapping.cache_layers import SplitLayer
from vlmattn.wrapping.on_cache import report_original_lengths

_OF_ROWS = (*OF_TOKENS, "per_layer_input")

Inputs = tuple[Step, Tensor, dict[str, Any]]
"""A step, the residual stream and the keyword arguments of a layer."""


def check_prompt(request: Request, recipe: str) -> None:
    """Raise for prompts whose tokens the recipe of that name cannot drop."""
    if not any(images for images, _ in request.newest):
        return
    if request.first_last_row < request.prompt_length - 1:
        raise InputError(
            f"'{recipe}' drops tokens, which needs prompts that are padded on the left; set"
            " processor.tokenizer.padding_side = 'left'"
        )
    if bool((request.types(request.prompt_length, torch.device("cpu"))[:, -1] != TEXT).any()):
        raise InputError(f"'{recipe}' drops image tokens, and a prompt ends in one; put the question behind the image")


def check_continuation(request: Request, recipe: str, start: int, labels: Any = None) -> None:
    """Raise if a cache was cropped within a prompt with dropped tokens, or a loss over all tokens is asked for."""
    if labels is not None:
        raise UnsupportedError(f"'{recipe}' drops tokens, so there is no loss over all of them; leave labels out")
    dropped = max((tokens.length for tokens in request.maps if tokens is not None), default=0)
    if start < min(request.prompt_length, dropped):  # a map may also speak of drafts behind the prompt
        raise StateError(
            f"this cache was cropped to {start} tokens, within a prompt that '{recipe}' has dropped tokens of; start"
            " a new generate()"
        )


def pruned_inputs(
    passing: Forward, layer: nn.Module, attends: bool, index: int, hidden: Tensor, kwargs: dict[str, Any]
) -> Inputs:
    """What the layer ``index`` gets, from what the library gives it; if it does not attend, it keeps a state."""
    step, plan = passing.main.step, passing.main.plan
    assert step is not None
    request = step.request
    if step.is_prompt:
        if layer.training:
            raise UnsupportedError(f"'{plan.name}' drops tokens, which is for inference; call model.eval()")
        given = sum(sum(images) for images, _ in request.newest)
        if given:
            hidden = _pruned(step, plan, layer, attends, index, hidden, kwargs)
        _note_rows(step, index, hidden, kwargs)
        request.ledger.add(("image tokens", str(index)), given if step.rows is None else sum(step.rows.visual))
        if index == 0:
            request.ledger.add(("prompts with images",), sum(bool(images) for images, _ in request.newest))
            request.ledger.add(("image tokens", "prompt"), given)
    if attends and (tables := kwargs.get("position_embeddings")) is not None:
        step.tables = index, tables
    source = plan.sources[index] if plan.sources else index  # of the same kind, with the same rows
    view, hidden, kwargs = _through(step, request.maps[index], attends, index, hidden, kwargs, source)
    return view, hidden, kwargs if view is step else {**kwargs, FORWARD: passing.at(view)}


def _pruned(
    step: Step, plan: Plan, layer: nn.Module, attends: bool, index: int, hidden: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """The rows that reach a layer, after the method that chooses before it."""
    if index == 0:
        for method in dict.fromkeys(plan.pruning):
            if method is not None:
                method.on_embeddings(_stage(step, layer, attends, index, hidden, kwargs))
    pruner = plan.pruning[index] if plan.pruning else None
    if pruner is None:
        return hidden
    stage = _stage(step, layer, attends, index, hidden, kwargs)
    choice = pruner.choose_tokens(stage)
    step.request.ledger.add(("fired", pruner.info.name), sum(stage.counts) - sum(choice.counts))
    return _follow(step, choice, hidden, pruner.drops, pruner.compact)


def _note_rows(step: Step, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
    """Let the request know which slots a layer goes on with; layers with the same rows share one map."""
    request, rows, start = step.request, step.rows, step.start or 0
    if rows is None:
        return
    before, real = request.maps[index], request.real(request.stop, hidden.device)
    report_original_lengths(compat.cache_of(kwargs))
    request.maps[index] = step.memo(
        ("tokens", before, rows), lambda: TokenMap.of(before, rows, start, request.stop, real)
    )


def _follow(step: Step, choice: KeptTokens, hidden: Tensor, drop: bool, compact: bool) -> Tensor:
    """Let the chosen rows go on; returns their residual stream."""
    request, start = step.request, step.start or 0
    rows = step.rows or request.rows_of_prompt(start, request.stop, hidden.device)
    if choice.hidden is not None:
        hidden = choice.hidden
    elif sum(choice.counts) == sum(rows.visual):
        return hidden
    keep = choice.visual | ~_visual(request, rows.slots)
    step.rows, order = rows.narrowed(keep, choice.counts, [text for _, text in request.newest], drop, compact)
    return hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1])) if drop else hidden


def _visual(request: Request, slots: Tensor) -> Tensor:
    """bool ``[batch, rows]``: real image tokens."""
    visual = request.types(request.stop, slots.device).gather(1, slots) != TEXT
    real = request.real(request.stop, slots.device)
    return visual if real is None else visual & real.gather(1, slots)


def _stage(
    step: Step, layer: nn.Module, attends: bool, index: int, hidden: Tensor, kwargs: dict[str, Any]
) -> PruningStage:
    """The rows that are there now, for a method that chooses among them."""
    request, start = step.request, step.start or 0
    rows = step.rows or request.rows_of_prompt(start, request.stop, hidden.device)
    visual = _visual(request, rows.slots)
    text = ~visual & (rows.slots < request.prompt_length)
    if rows.valid is not None:
        visual, text = visual & rows.valid, text & rows.valid
    before = request.maps[index]
    now = before
    if step.rows is not None:
        now = TokenMap.of(before, rows, start, request.stop, request.real(request.stop, hidden.device))
    view, _, seen = _through(step, now, attends, index, hidden, kwargs)
    tables = None
    if step.tables is not None:
        last, tables = step.tables
        if now is not None:
            tables = _tables(step, view, now, last, hidden, seen.get("position_ids"), tables)

    def weights(first: int, last: int, edit: AttentionEdit = NO_EDIT) -> Tensor:
        if view.start and isinstance(compat.cache_of(kwargs).layers[index], SplitLayer):
            raise refusal_of_apart(step, index)
        found = _weights_before(layer, index, hidden, seen, view.start or 0)(first, last, edit)
        return pad(found, ((view.start or 0) + hidden.shape[1] - found.shape[-1], 0))  # keys that left a window

    return PruningStage(
        request=view.request,
        layer=index,
        hidden=hidden,
        visual=visual,
        text=text,
        images=request.images(request.stop, hidden.device).gather(1, rows.slots),
        counts=rows.visual,
        given=tuple(images for images, _ in request.newest),
        weights=weights,
        start=view.start or 0,
        tables=tables,
    )


class _Seen(Exception):
    """The attention of a layer is known; the rest of it need not run."""


def _weights_before(layer: nn.Module, index: int, hidden: Tensor, kwargs: Mapping[str, Any], start: int) -> Weights:
    """Unedited attention of a layer that has not run yet; it runs up to its attention, and no hook hears of it."""
    past = compat.keys_before(compat.cache_of(kwargs), index, start) if start else None
    found: list[Weights] = []

    def ahead(weights: Weights) -> None:
        found.append(weights)
        raise _Seen

    given = {name: value for name, value in compat.with_cache(kwargs, None, layer).items() if name != "hidden_states"}
    with torch.no_grad(), suppress(_Seen):
        layer.forward(hidden, **given | {FORWARD: Forward(ahead=ahead, past=past)})
    return found[0]


def _through(
    step: Step,
    tokens: TokenMap | None,
    attends: bool,
    index: int,
    hidden: Tensor,
    kwargs: dict[str, Any],
    source: int | None = None,
) -> Inputs:
    """Inputs of a layer that goes on with some of the tokens; ``hidden`` are its rows, ``source`` has its keys."""
    if tokens is None:
        return step, hidden, kwargs
    view, newest = step.through(tokens), step.start == tokens.begin
    if attends:
        mask = _mask(step, view, tokens, index if source is None else source, index, hidden, kwargs)
    else:
        mask = _state_mask(step, view, tokens, kwargs.get("attention_mask"))
    found, ids, tables = (
        {**kwargs, "attention_mask": mask},
        kwargs.get("position_ids"),
        kwargs.get("position_embeddings"),
    )
    if newest:
        found |= {name: tokens.rows(kwargs[name]) for name in _OF_ROWS if isinstance(kwargs.get(name), Tensor)}
    if isinstance(ids, Tensor) and (newest or tokens.lost is not None):
        found["position_ids"] = view.memo(("positions", ids.device), lambda: _positions(tokens, ids, newest))
    if tables is not None:
        found["position_embeddings"] = _tables(step, view, tokens, index, hidden, found.get("position_ids"), tables)
    return view, hidden, found


def _positions(tokens: TokenMap, ids: Tensor, newest: bool) -> Tensor:
    """Position ids of a layer's rows, from those of all tokens."""
    return _rows_of(tokens, ids, 2) if tokens.lost is None else tokens.positions(ids, newest)


def _tables(step: Step, view: Step, tokens: TokenMap, index: int, hidden: Tensor, positions: Any, tables: Any) -> Any:
    """Rotary tables of a layer's rows, from those of all tokens; layers with the same ones share them."""
    rotary, newest = step.rotary, step.start == tokens.begin
    if tokens.lost is None and not newest:
        return tables
    if tokens.lost is not None and (rotary is None or not isinstance(positions, Tensor)):
        raise UnsupportedError(f"'{step.recipe}' counts positions anew, and this model's layers get none")

    def make() -> Any:
        if tokens.lost is not None:
            assert rotary is not None
            return rotary(hidden, positions, index)
        return (
            _rows_of(tokens, tables, 3) if isinstance(tables, Tensor) else tuple(_rows_of(tokens, t, 3) for t in tables)
        )

    return view.memo_of(tables, ("rotary", hidden.device), make)


def _state_mask(step: Step, view: Step, tokens: TokenMap, given: Tensor | None) -> Tensor | None:
    """Which rows enter the state of a layer without attention, ``[batch, rows]``; None = all."""
    if step.start != tokens.begin:
        return given
    valid = None if tokens.valid is None else tokens.valid[:, tokens.at :]
    if given is None and valid is None:
        return None
    if step.start and (valid is None or not bool(valid.all())):
        raise StateError(
            f"the turns of this batch have different lengths once '{step.recipe}' has dropped tokens, and layers"
            " without attention would count what fills them up; continue the conversations one by one"
        )

    def make() -> Tensor:
        rows = tokens.slots.new_ones(tokens.slots.shape)[:, tokens.at :] if given is None else tokens.rows(given)
        return rows if valid is None else rows * valid.to(rows)

    found: Tensor = view.memo(("state", None if given is None else given.device), make)
    return found


def _mask(
    step: Step, view: Step, tokens: TokenMap, source: int, index: int, hidden: Tensor, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The mask in the slots of a layer, whose keys are those of ``source``; layers with the same one in original slots
    share it."""
    given, cache, queries = kwargs.get("attention_mask"), compat.cache_of(kwargs), hidden.shape[1]
    layer = cache.layers[source] if cache is not None and source < len(cache.layers) else None
    window = compat.growing_window(layer)

    def held() -> int:
        return 0 if layer is None else int(layer.get_seq_length()) - (queries if index > source else 0)  # has run

    def make() -> Tensor | None:
        static = getattr(layer, "max_cache_len", None)
        passed, offset = 0, 0
        if window:
            width = min(held(), window - 1) + queries
            passed = held() + queries - width
        elif given is not None:
            width = given.shape[-1] - (0 if static else tokens.removed)
        else:
            width = static or held() + queries
        start = step.start if step.start is not None else passed + width + tokens.removed - queries
        if window:
            offset = max(start - window + 1, 0)  # the given mask begins there
        additive = hidden.dtype if step.base == "eager" else None
        return tokens.mask(given, start, queries, width, additive, passed, offset)

    return view.memo_of(given, ("mask", window), make)  # type: ignore[no-any-return]


def _rows_of(tokens: TokenMap, values: Tensor, axes: int) -> Tensor:
    """The kept rows of values ``[batch or 1, rows, ...]`` with so many axes, or of those of each axis of M-RoPE."""
    return tokens.rows(values) if values.ndim == axes else torch.stack([tokens.rows(part) for part in values])
