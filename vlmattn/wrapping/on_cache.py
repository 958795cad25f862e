"""What rides on a key-value cache while a wrapped model fills it, and what it answers instead of its class."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from vlmattn import compat
from vlmattn.request import NO_PLAN, Plan, Request, Step

REQUEST = "_vlmattn_request"  # the prompt that the cache was filled with
PLAN = "_vlmattn_plan"  # the plan that was in force
BRANCHES = "_vlmattn_branches"  # where the row groups of a call ride on its cache


def ride(cache: Any, request: Request, plan: Plan) -> None:
    """Let a request, and the plan that it was read under, ride on a cache."""
    setattr(cache, REQUEST, request)
    setattr(cache, PLAN, plan)


def request_on(cache: Any) -> Request | None:
    """The request that rides on a cache, if one does."""
    return getattr(cache, REQUEST, None)


def plan_on(cache: Any) -> Plan:
    """The plan that the request on a cache was read under."""
    return getattr(cache, PLAN, NO_PLAN)


def get_off(cache: Any) -> None:
    """Leave a cache as it was."""
    for name in (REQUEST, PLAN):
        cache.__dict__.pop(name, None)


def place(step: Step, cache: Any) -> None:
    """Note where the one new token goes, for methods that follow generated tokens too."""
    slot = cache.get_seq_length()
    step.slot = slot.clone() if isinstance(slot, torch.Tensor) else slot  # a static cache counts on in place
    step.capacity = compat.capacity(cache)


def follow_beams(cache: Any) -> None:
    """What is kept about generated tokens changes its row when beam search reorders the cache."""
    cache.reorder_cache = MethodType(_reorder_cache, cache)  # bound, so that a deep copy reorders itself


def _reorder_cache(self: Any, beams: Tensor) -> None:
    type(self).reorder_cache(self, beams)
    getattr(self, REQUEST).reorder(beams)


def repeated(request: Request, cache: Any, rows: int) -> Request:
    """The request of a cache whose rows were repeated by ``cache.batch_repeat_interleave``."""
    keys = next((layer.keys for layer in getattr(cache, "layers", ()) if hasattr(layer, "keys")), None)
    held = len(keys) if isinstance(keys, Tensor) else 0
    if request.batch and held == rows and rows % request.batch == 0:
        request = request.moved(torch.arange(request.batch).repeat_interleave(rows // request.batch))
        setattr(cache, REQUEST, request)
    return request


def report_original_lengths(cache: Any) -> None:
    """Let a cache tell the library, which cuts inputs and makes masks by them, its lengths in original slots."""
    if cache is not None and "get_seq_length" not in cache.__dict__:
        cache.get_seq_length = MethodType(_original_length, cache)  # bound, so that a deep copy asks itself
        cache.get_mask_sizes = MethodType(_original_sizes, cache)
        cache.reset = MethodType(_reset, cache)


def _original_length(self: Any, layer_idx: int = 0) -> Any:
    length, removed = type(self).get_seq_length(self, layer_idx), _removed(self, layer_idx)
    return length + removed * (length > 0)  # nothing before the first layer has run


def _reset(self: Any) -> None:
    """A cache that was reset may serve a prompt whose tokens all stay, also of a model that is not wrapped."""
    for name in ("get_seq_length", "get_mask_sizes", "reset"):
        self.__dict__.pop(name, None)
    self.reset()


def _original_sizes(self: Any, query_length: int, layer_idx: int) -> tuple[int, int]:
    length, offset = type(self).get_mask_sizes(self, query_length, layer_idx)
    layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
    if window := compat.growing_window(layer):
        held = self.get_seq_length(layer_idx)
        return min(held, window - 1) + query_length, max(held - window + 1, 0)
    return (length if hasattr(layer, "max_cache_len") else length + _removed(self, layer_idx)), offset


def _removed(cache: Any, layer: int) -> int:
    request, branches, counting = request_on(cache), getattr(cache, BRANCHES, None), compat.counting_layer(cache, layer)
    if branches is not None and branches.drops:
        return int(branches.removed(counting))
    tokens = request.maps[counting] if request is not None else None
    return 0 if tokens is None else tokens.removed
