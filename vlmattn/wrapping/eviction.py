"""What policies take out of a layer's cache once its attention has run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmattn import compat
from vlmattn.attention import FORWARD
from vlmattn.errors import UnsupportedError
from vlmattn.request import Eviction, Forward, LayerContext, Plan, Policy, Step, TokenMap
from vlmattn.wrapping.cache_layers import SplitLayer, merged, picked
from vlmattn.wrapping.on_cache import report_original_lengths


def check_cache(plan: Plan, cache: Any, used: bool) -> None:
    """Raise for caches that policies cannot work on; ``used`` without a cache: the decoder is going to make one."""
    names = ", ".join(dict.fromkeys(policy.info.name for policy in plan.policies))
    if not used:
        raise UnsupportedError(f"{names} works on cached keys and values; leave use_cache on")
    if cache is not None and compat.is_static(cache):
        raise UnsupportedError(
            f"{names} must know how far a cache is filled, and a static one does not tell; use a dynamic cache"
        )
    if cache is not None and plan.evicting and compat.keeps_elsewhere(cache):
        raise UnsupportedError(
            f"{names} takes keys and values out of the cache, which a quantized or an offloaded one keeps elsewhere;"
            " use a plain dynamic cache"
        )


def before_layer(step: Step, index: int, rows: int, cache: Any) -> None:
    """Tell a layer that keeps its heads apart which tokens of a further prompt are padding; ``rows`` reach it."""
    if step.is_prompt and cache is not None and index < len(cache.layers):
        layer = cache.layers[index]
        if isinstance(layer, SplitLayer):
            layer.expect(step.request.real(layer.length + rows, layer.keys.device))


def after_layer(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of a decoder layer."""
    passing: Forward | None = kwargs.get(FORWARD)
    if passing is None or len(passing.main.plan.evicting) == 0:
        return
    step, policy = passing.main.acting, passing.main.plan.evicting[index]
    if step is None or policy is None:
        return
    cache = compat.cache_of(kwargs)
    layer, request = cache.layers[index], step.request
    if isinstance(layer, SplitLayer):
        return
    queries, keys = (args[0] if args else kwargs["hidden_states"]).shape[1], layer.keys.shape[-2]
    context = LayerContext(step, index, queries, keys, layer.keys.device)
    split = policy.split(context) if step.is_prompt else None
    if split is not None and len(split.full) < layer.keys.shape[1]:
        cache.layers[index] = apart = SplitLayer(layer, context.real, split)
        request.ledger.add(("fired", policy.info.name), apart.let_go)
    if (found := policy.evict(context)) is not None:
        _evict(policy, found, context, cache)


def _evict(policy: Policy, found: Eviction, context: LayerContext, cache: Any) -> None:
    """Take slots out of a layer's cache, or hide them."""
    request, index, keys, layer = context.request, context.layer, context.keys, cache.layers[context.layer]
    if found.joined is not None:
        layer.keys, layer.values = (merged(states, *found.joined) for states in (layer.keys, layer.values))
    if policy.drops:
        order, valid = found.order(context.real)
        layer.keys, layer.values = (picked(states, order) for states in (layer.keys, layer.values))
        order = order if order.ndim == 2 else order[:, 0]  # valid alike in all heads, and nobody else looks
    else:
        order = torch.arange(keys, device=context.device).expand(found.keep.shape)
        valid = found.keep if context.real is None else found.keep & context.real
    request.evict(index, TokenMap.evicted(request.maps[index], order, valid, keys), order, keys)
    request.ledger.add(("fired", policy.info.name), sum(keys - count for count in found.counts))
    report_original_lengths(cache)
