"""Prompts without images under a recipe about images: the bare model answers them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.models import OF_PIXELS
from vlmattn.request import NO_PLAN, TEXT, Plan, Request
from vlmattn.wrapping.on_cache import plan_on, request_on
from vlmattn.wrapping.record import Record


def answers_bare(record: Record, model: PreTrainedModel, plan: Plan, inputs: Mapping[str, Any]) -> bool:
    """Whether the bare model is to answer a generate() call: text alone so far, and a recipe about images.

    A cache that the caller gave and that is still empty says that images may follow: the recipe reads the text then.
    """
    rule, cache = plan.decoding, compat.cache_of(inputs)
    sees = rule is not None and any(branch.sees for branch in rule.branches)
    if record.measuring or not (sees or _edits_images(plan)):
        return False
    if cache is not None and not _filled(cache) and plan.text_first and rule is None:
        return False
    if request_on(cache) is not None and _filled(cache) and plan_on(cache) is not NO_PLAN:
        return False
    return _is_text(record, model, inputs, inputs.get("inputs", inputs.get("input_ids")))


def noted_text(record: Record, model: PreTrainedModel, plan: Plan, inputs: Mapping[str, Any]) -> Request | None:
    """The text of a forward outside of generate() that the bare model reads, with what its cache has from before.

    None: the recipe has something to do, or nobody knows what is in the cache.
    """
    cache, ids = compat.cache_of(inputs), inputs.get("input_ids")
    before = request_on(cache)
    if (before is not None and plan_on(cache) is not NO_PLAN) or record.measuring or not _edits_images(plan):
        return None
    start = 0 if cache is None else int(cache.get_seq_length())
    if start == 0 and (cache is None or not plan.text_first):
        before = Request(len(plan.by_layer))
    elif start == 0:
        return None
    if before is None or ids is None or not _is_text(record, model, inputs, ids):
        return None
    if before.batch not in (None, len(ids)):
        return None
    return _with_text(before, start, ids)


def _with_text(text: Request, start: int, ids: Tensor) -> Request:
    """The request with ``ids`` ``[batch, new]`` from slot ``start`` on."""
    types = torch.full_like(ids, TEXT, dtype=torch.uint8)
    text.extend(start, types, torch.full_like(types, -1, dtype=torch.int16), None, None, ids)
    return text


def _edits_images(plan: Plan) -> bool:
    return not (plan.is_identity or plan.texts)


def _filled(cache: Any) -> bool:
    return not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) > 0


def _is_text(record: Record, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Any) -> bool:
    """Whether there are token ids, no image tokens among them, and no pictures beside them."""
    if record.anatomy.leading or not record.family.placeholders(model):
        return False
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return False
    if inputs.get("inputs_embeds") is not None or any(inputs.get(name) is not None for name in OF_PIXELS):
        return False
    return not bool((record.family.token_types(model, ids) != TEXT).any())
