"""The attention function that transformers calls in the decoder of a wrapped model.

It asks the active methods for their edits and hands them to a kernel; with nothing to do it calls the implementation
that the model had, with the very same arguments. What it does for a given call is decided by the ``Forward`` that the
model's pre-hook passes along, never by global state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn import compat
from vlmattn.bases import seen_by_flash
from vlmattn.errors import UnsupportedError
from vlmattn.kernels import NO_EDIT, AttentionEdit, Problem, SplitStates, Visibility, attend, scale_heads
from vlmattn.kernels import weights as attention_weights
from vlmattn.request import BARE, Forward, ImageContext, LayerContext, Looker, Part, Plan, SideStream, Step, Weights

FORWARD = "vlmattn_forward"  # the keyword argument on which a forward travels through the decoder

#: Stands for weights that a layer cannot tell: transformers leaves None out, and those of later layers would move up.
NO_WEIGHTS = torch.empty(0)

Output = tuple[Tensor, Tensor | None]
Labelled = tuple[Tensor, Tensor | None, str]
"""Head outputs ``[batch, query, heads, dim]``, weights if there are some, and what ``report()`` calls who computed
them."""


@dataclass(eq=False)
class _Layer:
    """What transformers gives the attention of one layer: states ``[batch, heads, query or key, dim]``.

    Attributes:
        base: the implementation that the model had.
    """

    base: Callable[..., Output]
    module: nn.Module
    query: Tensor
    key: Any
    value: Any
    mask: Tensor | None
    kwargs: dict[str, Any]

    @property
    def index(self) -> int:
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @property
    def phase(self) -> str:
        return "decode" if self.query.shape[2] == 1 else "prefill"

    def bare(self) -> Output:
        """As the model does without us."""
        return self.base(self.module, self.query, self.key, self.value, self.mask, **self.kwargs)

    def of(self, rows: slice) -> _Layer:
        """Some rows of the batch."""
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows]
        return replace(self, query=self.query[rows], key=self.key[rows], value=self.value[rows], mask=mask)

    def problem(self, see: Visibility, edit: AttentionEdit = NO_EDIT) -> Problem:
        """The call as kernels take it."""
        kwargs, scale = self.kwargs, float(self.kwargs.get("scaling") or self.query.shape[-1] ** -0.5)
        softcap, sinks, dropout = kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.get("dropout", 0.0)
        return Problem(self.query, self.key, self.value, see, scale, edit, softcap, sinks, dropout)

    def with_any_mask(self) -> Tensor:
        """As ``bare``, by our kernels, which take every mask: ``[batch, query, heads, dim]``."""
        return attend(self.problem(Visibility(self.mask, plain=False)))[0].transpose(1, 2).contiguous()

    def weights(self, see: Visibility, edit: AttentionEdit = NO_EDIT) -> Weights:
        """Attention of a few query rows, computed when somebody asks."""
        problem = self.problem(see, edit)

        def weights(start: int, stop: int, edit: AttentionEdit = edit) -> Tensor:
            return attention_weights(replace(problem, edit=edit), start, stop)

        return weights

    def seen(self, context: LayerContext) -> Visibility:
        """What the unedited model sees; the mask of a window that is shorter than the prompt is not just causal."""
        see, window, tokens = context.visibility(self.mask), self.kwargs.get("sliding_window"), context.request.tokens
        gone = 0 if tokens is None else tokens.removed
        if window is None or context.keys + gone <= window or context.queries == 1:
            return see
        places = None if tokens is None else tokens.columns(0, context.keys)
        return replace(see, plain=False, window=window, places=places)

    def wants_weights(self, step: Step | None) -> bool:
        """Whether the caller of the model asked for attention weights."""
        if step is not None and step.wants_weights:
            return True
        asked = self.kwargs.get("output_attentions")
        return bool(
            getattr(getattr(self.module, "config", None), "output_attentions", False) if asked is None else asked
        )


def function_in_place_of(name: str) -> Callable[..., Output]:
    """The attention function of models that had the implementation ``name``."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Output:
        passing: Forward = kwargs.pop(FORWARD, None) or BARE
        if name not in ("sdpa", "eager"):
            _refuse_indexer(name, kwargs)
            if compat.mask_kind(name) == "flash":
                attention_mask = seen_by_flash(module, query, key, attention_mask, kwargs)
        attention_mask = compat.with_chosen_keys(module, query, key, attention_mask, kwargs)
        layer = _Layer(compat.attention_function(name, module), module, query, key, value, attention_mask, kwargs)
        if passing.ahead is not None:
            _look_ahead(layer, passing)
        if isinstance(key, SplitStates):
            return _run_apart(layer, passing.main, name)
        if len(passing.parts) == 1:
            return _run(layer, passing.main)
        if all(part.step is None for part in passing.parts):
            return layer.bare()
        outs, attended = zip(*(_run(layer.of(part.rows), part) for part in passing.parts), strict=True)
        whole = all(found is not None for found in attended)
        return torch.cat(outs), torch.cat(attended) if whole else None

    return forward


def _refuse_indexer(name: str, kwargs: dict[str, Any]) -> None:
    if any(kwargs.get(given) is not None for given in ("indices", "block_indices")):
        raise UnsupportedError(
            f"layers whose indexer chooses keys hand '{name}' the choice in a form of its own; load the model with"
            " attn_implementation='sdpa'"
        )


def _look_ahead(layer: _Layer, passing: Forward) -> None:
    """Tell the weights that the layer would have; it has not run, so its older keys come along."""
    assert passing.ahead is not None
    if passing.past is not None:
        layer = replace(layer, key=torch.cat([passing.past, layer.key], 2))
    passing.ahead(layer.weights(Visibility(layer.mask)))


def _run(layer: _Layer, part: Part) -> Output:
    """Attention of the rows of one request."""
    if part.step is None:
        return layer.bare()
    if part.watch is not None:
        out, attended = layer.bare()
        gain = part.watch(layer.index, out, layer.weights(Visibility(layer.mask)))
        return (out if gain is None else out * gain[:, None, :, None].to(out.dtype)), attended
    plan, index = part.plan, layer.index
    context = _context(layer, part.step, plan)
    _tell(layer, context, plan)
    streams = [stream for stream in part.streams if stream.waits_at(index)]
    if len(streams) > 0:
        out, attended, label, edit = _attend_beside(layer, context, plan, streams)
    else:
        edit = AttentionEdit()
        for method in plan.by_layer[index]:
            edit = edit.then(method.edit(context))
        out, attended, label = _attend(layer, context, edit)
    if plan.watching:
        _refuse_showing(part, part.step, index)
    for watcher in plan.watching:
        watcher.attended(context, edit, layer.weights(layer.seen(context), edit))
    context.request.ledger.add(("calls", layer.phase, label, str(index)))
    return out, attended


def _context(layer: _Layer, step: Step, plan: Plan) -> LayerContext:
    """What methods see of a layer."""
    query, keys = layer.query, layer.key.shape[2]
    if layer.index in plan.cross:
        return ImageContext(step, layer.index, query.shape[2], keys, query.device, query.shape[1], plan.image_keys)
    step = _in_window(step, query, keys)
    return LayerContext(step, layer.index, query.shape[2], keys, query.device, query.shape[1])


def _tell(layer: _Layer, context: LayerContext, plan: Plan) -> None:
    """Let methods see queries, keys and unedited attention of a layer."""
    for policy in plan.on_queries_keys[context.layer] if plan.on_queries_keys else ():
        policy.on_queries_keys(context, layer.query, layer.key)
    looking = [method for method in plan.on_attention[context.layer] if _looks(method, plan, context.step)]
    if looking:
        weights = layer.weights(layer.seen(context))
        for method in looking:
            method.on_attention(context, weights)


def _looks(method: Looker, plan: Plan, step: Step) -> bool:
    """Whether a method looks at this step; one that drops image tokens does at prompts that have some."""
    if step.is_prompt and method in plan.pruning:
        return any(images for images, _ in step.request.newest)
    return step.is_prompt or method.follows_attention


def _attend_beside(
    layer: _Layer, context: LayerContext, plan: Plan, streams: Sequence[SideStream]
) -> tuple[Tensor, Tensor | None, str, AttentionEdit]:
    """Attention of a prompt that streams accompany; they run before the head gains, which some methods know then."""
    methods = plan.by_layer[context.layer]
    comparing = [stream.method for stream in streams if context.layer in stream.layers]
    edits = {method: method.edit(context) for method in methods if method not in comparing}
    out, attended, label = _attend(layer, context, replace(_composed(edits.values()), head_gain=()))
    for stream in streams:
        stream.follow(out)
    edit = _composed(edits[method] if method in edits else method.edit(context) for method in methods)
    if not edit.head_gain:
        return out, attended, label, edit
    label = label + "+head_gain" if label.startswith("base:") else label
    return _scaled(out, edit), attended, label, edit


def _composed(edits: Iterable[AttentionEdit]) -> AttentionEdit:
    return reduce(AttentionEdit.then, edits, AttentionEdit())


def _scaled(out: Tensor, edit: AttentionEdit) -> Tensor:
    """Head outputs ``[batch, query, heads, dim]`` with the edit's head gains."""
    return scale_heads(edit, out.transpose(1, 2)).transpose(1, 2).contiguous()


def _attend(layer: _Layer, context: LayerContext, edit: AttentionEdit) -> Labelled:
    """Attention with an edit."""
    label = base_label(context.step.base)
    if edit.shift is not None:
        query, edit = edit.shifted(layer.query)
        layer, label = replace(layer, query=query), f"{label}+shift"
    if edit.is_identity:
        return *layer.bare(), label
    if edit.only_head_gain:
        out, attended = layer.bare()
        return _scaled(out, edit), attended, f"{label}+head_gain"
    if edit.read is not None and edit.read.shape[1] != layer.key.shape[1]:  # all KV heads alike
        edit = replace(edit, read=edit.read.expand(-1, layer.key.shape[1], -1))
    problem = layer.problem(layer.seen(context), edit)
    out, backend = attend(problem)
    attended = None
    if context.step.base == "eager" and layer.wants_weights(context.step):  # as the bare model: sdpa has none to give
        attended = attention_weights(problem, 0, problem.rows).to(layer.query.dtype)
    return out.transpose(1, 2).contiguous(), attended, backend


def _run_apart(layer: _Layer, part: Part, name: str) -> Output:
    """Attention of a layer whose KV heads keep different tokens: those that keep all, then the others."""
    eager, flash = name == "eager", compat.mask_kind(name) == "flash"
    query, key, value = layer.query, layer.key, layer.value
    batch, _, queries, dim = query.shape
    step = part.acting
    if step is not None:
        _refuse_looking_apart(part, step, layer.index)
    packed, outs = query.reshape(batch, key.kv_heads, -1, queries, dim), []
    near_mask = key.near_mask(queries, query, eager)
    for heads, keys, values, seen in (
        (key.full_heads, key.full, value.full, layer.mask),
        (key.near_heads, key.near, value.near, near_mask),
    ):
        if len(heads):
            own = replace(layer, query=packed[:, heads].flatten(1, 2), key=keys, value=values, mask=seen)
            out = own.bare()[0] if keys is key.full or not flash else own.with_any_mask()
            outs.append(out.view(batch, queries, len(heads), -1, out.shape[-1]))
    if step is not None:
        step.request.ledger.add(("calls", layer.phase, "split", str(layer.index)))
    attended = NO_WEIGHTS if eager and layer.wants_weights(step) else None
    return torch.cat(outs, 2)[:, :, key.back].flatten(2, 3), attended


def _refuse_showing(part: Part, step: Step | None, layer: int) -> None:
    """Raise where every KV head holds tokens of its own, and somebody watches which are looked at."""
    policy = part.plan.evicting[layer] if part.plan.evicting else None
    if policy is not None and policy.by_head and policy.drops and step is not None and step.start != 0:
        raise _cannot_be_shown(part, layer)


def _cannot_be_shown(part: Part, layer: int) -> UnsupportedError:
    return UnsupportedError(
        f"attention under '{part.plan.name}' cannot be shown: heads of layer {layer} are kept apart, with different"
        " tokens"
    )


def _refuse_looking_apart(part: Part, step: Step, layer: int) -> None:
    """Raise if a method wants to know what rows look at, where some heads have let tokens go."""
    if part.plan.watching:
        raise _cannot_be_shown(part, layer)
    if any(_looks(method, part.plan, step) for method in part.plan.on_attention[layer]):
        raise refusal_of_apart(step, layer)


def refusal_of_apart(step: Step, layer: int) -> UnsupportedError:
    """Why a further prompt cannot go through a layer whose heads are kept apart."""
    return UnsupportedError(
        f"'{step.recipe}' must measure attention to all tokens in layer {layer}, where some heads have let tokens of"
        " the prompts before go; give the whole conversation as one prompt"
    )


def base_label(name: str) -> str:
    """How ``report()`` names layers and phases that ran the model's own implementation."""
    return f"base:{name}"


def _in_window(step: Step, query: Tensor, keys: int) -> Step:
    """The step in the slots of a layer with a sliding window, which holds the last tokens only."""
    last = step.start if step.start is not None else step.slot
    if not isinstance(last, int):  # no window that could be reached
        return step
    passed = last + query.shape[2] - keys
    if passed <= 0:
        return step
    view = step.through(step.request.windowed(passed, query.device))
    view.passed = passed
    return view
