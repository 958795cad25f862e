"""The attention function that transformers calls in the decoder of a wrapped model.

It asks the active methods for their edits and hands them to a kernel; with nothing to do it calls the implementation
that the model had, with the very same arguments. The names below are registered once per process and stay: what they
do for a given call is decided by the ``Step`` that the model's pre-hook passes along, never by global state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from vlmattn.errors import UnsupportedError
from vlmattn.kernels import NO_EDIT, AttentionEdit, Problem, SplitStates, Visibility, attend, scale_heads
from vlmattn.kernels import weights as attention_weights
from vlmattn.request import LayerContext, Looker, Parts, SideStream, Step, Steps, Weights

STEP = "vlmattn_step"  # the keyword argument on which a step travels through the decoder

#: Implementation a model may have when it is wrapped, and the name it has while wrapped. The names must not contain
#: "flash", "sdpa" or "flex": transformers tests for those words.
NAMES = {"sdpa": "vlmattn", "eager": "vlmattn_eager"}

#: Stands for weights that a layer cannot tell: transformers leaves None out, and those of later layers would move up.
NO_WEIGHTS = torch.empty(0)

Output = tuple[Tensor, Tensor | None]


@dataclass(eq=False)
class Probe:
    """Stands for a step where only the attention weights of a layer are asked for, before the layer runs.

    Attributes:
        past: keys ``[batch, kv_heads, key, dim]`` that the layer has from before; None = none.
        weights: what is found; None before.
    """

    past: Tensor | None
    weights: Weights | None = None
    parts: Parts = ((slice(None), None),)


Labelled = tuple[Tensor, Tensor | None, str]
"""Head outputs ``[batch, query, heads, dim]``, weights if there are some, and what ``report()`` calls who computed them."""


def _base(name: str, module: nn.Module) -> Callable[..., Output]:
    if name == "sdpa":
        return cast("Callable[..., Output]", sdpa_attention_forward)
    return cast("Callable[..., Output]", sys.modules[type(module).__module__].eager_attention_forward)


def _registered(base_name: str) -> Callable[..., Output]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Output:
        step: Step | Steps | Probe | None = kwargs.pop(STEP, None)
        if isinstance(step, Probe):
            key = key if step.past is None else torch.cat([step.past, key], 2)
            step.weights = _weights_of(_problem(Visibility(attention_mask), query, key, value, kwargs))
            batch, heads, queries, _ = query.shape
            return query.new_zeros(batch, queries, heads, value.shape[-1]), None  # latent attention has short values
        base = _base(base_name, module)
        if isinstance(key, SplitStates) and isinstance(value, SplitStates):
            return _run_apart(base, step, module, query, key, value, attention_mask, kwargs)
        if step is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        if isinstance(step, Step):
            return _run(base, step, module, query, key, value, attention_mask, kwargs)
        return _run_parts(base, step, module, query, key, value, attention_mask, kwargs)

    return forward


def _run_apart(
    base: Callable[..., Output],
    step: Step | Steps | None,
    module: nn.Module,
    query: Tensor,
    key: SplitStates,
    value: SplitStates,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Output:
    """Attention of a layer whose KV heads keep different tokens: those that keep all, then the others."""
    batch, _, queries, dim = query.shape
    if isinstance(step, Step):
        _refuse_measuring_apart(step, int(module.layer_idx))  # type: ignore[arg-type]
    packed, outs = query.reshape(batch, key.kv_heads, -1, queries, dim), []
    eager = base is not _base("sdpa", module)
    near_mask = key.near_mask(queries, query, eager)
    for heads, keys, values, seen in (
        (key.full_heads, key.full, value.full, mask),
        (key.near_heads, key.near, value.near, near_mask),
    ):
        if len(heads):
            out, _ = base(module, packed[:, heads].flatten(1, 2), keys, values, seen, **kwargs)
            outs.append(out.view(batch, queries, len(heads), -1, out.shape[-1]))
    if isinstance(step, Step):
        phase = "decode" if queries == 1 else "prefill"
        step.request.ledger.add(("calls", phase, "split", str(module.layer_idx)))
    attended = NO_WEIGHTS if eager and _wants_weights(step, module, kwargs) else None
    return torch.cat(outs, 2)[:, :, key.back].flatten(2, 3), attended


def _wants_weights(step: Step | Steps | None, module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller of the model asked for attention weights."""
    if isinstance(step, Step) and step.wants_weights:
        return True
    asked = kwargs.get("output_attentions")
    return bool(getattr(getattr(module, "config", None), "output_attentions", False) if asked is None else asked)


def _refuse_measuring_apart(step: Step, layer: int) -> None:
    """Raise if a method wants to know what rows look at, where some heads have let tokens go."""
    plan = step.request.plan
    if plan.watching:
        raise UnsupportedError(
            f"attention under '{plan.name}' cannot be shown: heads of layer {layer} are kept apart, with different tokens"
        )
    if any(_measures(method, step) for method in plan.on_attention[layer]):
        raise refusal_of_apart(step, layer)


def refusal_of_apart(step: Step, layer: int) -> UnsupportedError:
    """Why a further prompt cannot go through a layer whose heads are kept apart."""
    return UnsupportedError(
        f"'{step.request.plan.name}' must measure attention to all tokens in layer {layer}, where some heads have let tokens of"
        " the prompts before go; give the whole conversation as one prompt"
    )


def _run_parts(
    base: Callable[..., Output],
    steps: Steps,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Output:
    """Row groups one after another, each with its own edit; without any, all rows at once."""
    if all(step is None for _, step in steps.parts):
        return base(module, query, key, value, mask, **kwargs)
    outs = []
    for rows, step in steps.parts:
        inputs = query[rows], key[rows], value[rows], mask if mask is None or len(mask) == 1 else mask[rows]
        outs.append(base(module, *inputs, **kwargs) if step is None else _run(base, step, module, *inputs, kwargs))
    attended = [found for _, found in outs]
    whole = all(found is not None for found in attended)
    return torch.cat([out for out, _ in outs]), torch.cat(attended) if whole else None  # type: ignore[arg-type]


def _run(
    base: Callable[..., Output],
    step: Step,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Output:
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if step.watch is not None:
        out, attended = base(module, query, key, value, mask, **kwargs)
        gain = step.watch(layer, out, _weights_of(_problem(Visibility(mask), query, key, value, kwargs)))
        return (out if gain is None else out * gain[:, None, :, None].to(out.dtype)), attended
    plan = step.request.plan
    step = _in_window(step, query, key.shape[2])
    context = LayerContext(step, layer, query.shape[2], key.shape[2], query.device, query.shape[1])
    edit = AttentionEdit()
    for policy in plan.on_queries_keys[layer] if plan.on_queries_keys else ():
        policy.on_queries_keys(context, query, key)
    measuring = [method for method in plan.on_attention[layer] if _measures(method, step)]
    if measuring:
        look = _weights_of(_problem(_seen(context, mask, kwargs), query, key, value, kwargs))
        for method in measuring:
            method.on_attention(context, look)
    attend_with = partial(_attend, base, context, module, query, key, value, mask, kwargs)
    streams = [stream for stream in step.beside if stream.waits_at(layer)]
    if len(streams) > 0:
        out, attended, label, edit = _attend_beside(attend_with, context, streams)
    else:
        for method in plan.by_layer[layer]:
            edit = edit.then(method.edit(context))
        out, attended, label = attend_with(edit)
    for watcher in plan.watching:
        problem = _problem(_seen(context, mask, kwargs), query, key, value, kwargs, edit)
        watcher.attended(context, edit, _weights_of(problem))
    step.request.ledger.add(("calls", "decode" if query.shape[2] == 1 else "prefill", label, str(layer)))
    return out, attended


def _measures(method: Looker, step: Step) -> bool:
    """Whether a method wants to know what rows of this step look at: one that drops image tokens, of prompts that have some."""
    if step.is_prompt and method in step.request.plan.pruning:
        return any(images for images, _ in step.request.newest)
    return step.is_prompt or method.follows_attention


def _attend_beside(
    attend_with: Callable[[AttentionEdit], Labelled], context: LayerContext, streams: Sequence[SideStream]
) -> tuple[Tensor, Tensor | None, str, AttentionEdit]:
    """Attention of a prompt that streams accompany, with its edit: they run before the head gains, which some methods only
    know then."""
    methods = context.request.plan.by_layer[context.layer]
    comparing = [stream.method for stream in streams if context.layer in stream.layers]
    edits = {method: method.edit(context) for method in methods if method not in comparing}
    out, attended, label = attend_with(replace(_composed(edits.values()), head_gain=()))
    for stream in streams:
        stream.follow(out)
    edit = _composed(edits[method] if method in edits else method.edit(context) for method in methods)
    if not edit.head_gain:
        return out, attended, label, edit
    out = scale_heads(edit, out.transpose(1, 2)).transpose(1, 2).contiguous()
    return out, attended, label + "+head_gain" if label.startswith("base:") else label, edit


def _composed(edits: Iterable[AttentionEdit]) -> AttentionEdit:
    return reduce(AttentionEdit.then, edits, AttentionEdit())


def _attend(
    base: Callable[..., Output],
    context: LayerContext,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
    edit: AttentionEdit,
) -> Labelled:
    """Attention with an edit."""
    label = base_label(context.step.base)
    if edit.shift is not None:
        query, edit = edit.shifted(query)
        label = f"{label}+shift"
    if edit.is_identity:
        return *base(module, query, key, value, mask, **kwargs), label
    if edit.only_head_gain:
        out, attended = base(module, query, key, value, mask, **kwargs)
        return scale_heads(edit, out.transpose(1, 2)).transpose(1, 2).contiguous(), attended, f"{label}+head_gain"
    if edit.read is not None and edit.read.shape[1] != key.shape[1]:  # all KV heads alike
        edit = replace(edit, read=edit.read.expand(-1, key.shape[1], -1))
    problem = _problem(_seen(context, mask, kwargs), query, key, value, kwargs, edit)
    out, backend = attend(problem)
    attended = None
    if context.step.base == "eager" and _wants_weights(
        context.step, module, kwargs
    ):  # as the bare model: sdpa has none to give
        attended = attention_weights(problem, 0, problem.rows).to(query.dtype)
    return out.transpose(1, 2).contiguous(), attended, backend


def _problem(
    see: Visibility, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any], edit: AttentionEdit = NO_EDIT
) -> Problem:
    """The call as kernels take it."""
    scale = float(kwargs.get("scaling") or query.shape[-1] ** -0.5)
    return Problem(
        query, key, value, see, scale, edit, kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.get("dropout", 0.0)
    )


def _weights_of(problem: Problem) -> Weights:
    """Attention of a few query rows, computed when somebody asks."""

    def weights(start: int, stop: int, edit: AttentionEdit = problem.edit) -> Tensor:
        return attention_weights(replace(problem, edit=edit), start, stop)

    return weights


def base_label(name: str) -> str:
    """How ``report()`` names layers and phases that ran the model's own implementation."""
    return f"base:{name}"


def _in_window(step: Step, query: Tensor, keys: int) -> Step:
    """The step in the slots of a layer that has fewer keys than there were tokens: a sliding window goes with the last."""
    last = step.start if step.start is not None else step.slot
    if not isinstance(last, int):  # no window that could be reached
        return step
    passed = last + query.shape[2] - keys
    if passed <= 0:
        return step
    view = step.through(step.request.windowed(passed, query.device))
    view.passed = passed
    return view


def _seen(context: LayerContext, mask: Tensor | None, kwargs: dict[str, Any]) -> Visibility:
    """What the unedited model sees; the mask of a window that is shorter than the prompt is not just causal."""
    see, window = context.visibility(mask), kwargs.get("sliding_window")
    if window is None or context.keys <= window or context.queries == 1:
        return see
    return replace(see, plain=False, window=window)


def register() -> None:
    """Make the names known to transformers (idempotent; they stay registered)."""
    AttentionInterface.register(NAMES["sdpa"], _registered("sdpa"))
    AttentionInterface.register(NAMES["eager"], _registered("eager"))
    # Without a mask function of the same name transformers drops every mask silently.
    AttentionMaskInterface.register(NAMES["sdpa"], sdpa_mask)
    AttentionMaskInterface.register(NAMES["eager"], eager_mask)
