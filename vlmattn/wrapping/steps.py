"""Makes a ``Forward`` of every forward of a wrapped model: whose rows they are, and what acts on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.attention import FORWARD
from vlmattn.errors import InputError, StateError, UnsupportedError
from vlmattn.kernels import visible
from vlmattn.models import Family, about_images
from vlmattn.request import IMAGE, NO_PLAN, TEXT, Forward, Part, Plan, Request, Step
from vlmattn.wrapping.branch_cache import branches_on
from vlmattn.wrapping.call import Call
from vlmattn.wrapping.eviction import check_cache
from vlmattn.wrapping.on_cache import follow_beams, get_off, place, plan_on, repeated, request_on, ride
from vlmattn.wrapping.pruning import check_continuation, check_prompt
from vlmattn.wrapping.record import Record
from vlmattn.wrapping.registration import check_registration
from vlmattn.wrapping.text_alone import noted_text


def forward_of(record: Record, model: PreTrainedModel, call: Call | None, inputs: dict[str, Any]) -> Forward | None:
    """What the decoder has to know of this forward; None when there is nothing to do in it."""
    cache = compat.cache_of(inputs)
    if (branches := branches_on(cache)) is not None:
        branches.check(call)
        return branches.forward(cache, inputs["input_ids"].shape[1])
    assert call is not None
    if call.direct and (text := noted_text(record, model, call.plan, inputs)) is not None:
        record.now.warn_of_text(call.plan.name)
        return Forward((Part(noted=text),))
    part = _part(record, model, call, inputs)
    early = call.branches.contrast.layers if call.branches is not None and call.branches.cache is not None else ()
    if part.step is None and not early and call.blank is None:
        return None
    return Forward((part,), dict.fromkeys(early), call.blank)


def _part(record: Record, model: PreTrainedModel, call: Call, inputs: dict[str, Any]) -> Part:
    """The rows of this forward, with the step in which the methods act on them."""
    cache, plan = compat.cache_of(inputs), call.plan
    tokens = _tokens_of(inputs)
    request = _request_so_far(cache, plan, tokens)
    if tokens is None or (plan.is_identity and request is None):
        return Part()
    rode = request if tokens.shape[1] == 1 else None  # with a request from before, one token may need no look from here
    if (
        rode is not None and rode.call is call.token and not _in_pieces(call)
    ):  # in generate(), where nothing may wait for the device
        return Part(step=_decode_step(record, rode, plan, cache), plan=plan)
    start = int(cache.get_seq_length()) if cache is not None else 0
    if start == 0 and plan.is_identity:
        get_off(cache)  # of a prompt before the cache was reset
        return Part()
    request = _request_for(record, model, call, inputs, request, start, len(tokens))
    check_registration(record.text, record.base)
    if rode is not None and call.prompt_length is None and start >= rode.prompt_length > 0:
        return Part(step=_decode_step(record, rode, plan, cache), plan=plan)
    return Part(step=_prompt_step(record, model, call, inputs, request, start), plan=plan)


def _in_pieces(call: Call) -> bool:
    """Tokens of a prompt that comes in pieces are still to come."""
    return call.ahead is not None and call.ahead.entered < (call.prompt_length or 0)


def _tokens_of(inputs: dict[str, Any]) -> Tensor | None:
    """Ids ``[batch, new]`` or embeddings ``[batch, new, hidden]``."""
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")


def _request_for(
    record: Record,
    model: PreTrainedModel,
    call: Call,
    inputs: dict[str, Any],
    request: Request | None,
    start: int,
    rows: int,
) -> Request:
    """The request of tokens that enter a cache at slot ``start``: a new one, or that of the cache so far."""
    if start == 0:
        return Request(len(call.plan.by_layer), counts=call.plan.drops)
    if request is None or plan_on(compat.cache_of(inputs)) is NO_PLAN:
        return _read_before(record, model, call, inputs, request, start, rows)
    _check_request(request, plan_on(compat.cache_of(inputs)), call.plan, rows)
    return request


def _request_so_far(cache: Any, plan: Plan, tokens: Tensor | None) -> Request | None:
    """The request that rides on a cache, in as many rows as there are tokens."""
    request = request_on(cache)
    if request is None:
        return None
    read_bare = plan.is_identity and plan_on(cache) is NO_PLAN
    if read_bare or _untouched(request, plan_on(cache), plan):  # a text that no method has changed
        get_off(cache)
        return None
    return request if tokens is None or request.batch == len(tokens) else repeated(request, cache, len(tokens))


def _decode_step(record: Record, request: Request, plan: Plan, cache: Any) -> Step:
    """The step of one new token."""
    step = Step(request, record.base, None, recipe=plan.name)
    if cache is not None and (plan.extending or record.anatomy.window):
        place(step, cache)
    return step


def _prompt_step(
    record: Record, model: PreTrainedModel, call: Call, inputs: dict[str, Any], request: Request, start: int
) -> Step:
    """The step of tokens of a prompt, or of drafts behind it; the request reads them."""
    plan, cache, mask = call.plan, compat.cache_of(inputs), _full_mask(inputs)
    refuse_packing(inputs)
    if plan.drops:
        check_continuation(request, plan.name, start or request.prompt_length, inputs.get("labels"))
    request.ledger, request.call = call.ledger, call.token
    call.tower.sizes = about_images(inputs)
    if start == 0 or call.prompt_length is None or start < call.prompt_length:  # not the draft of assisted decoding
        _read(record, model, call, inputs, request, start, mask)
    _refuse_text(request, call)
    if plan.policies:
        check_cache(plan, cache, cache is not None or _uses_cache(model, inputs))
    if cache is not None:
        _board(cache, request, plan, record.anatomy.window)
    plain = record.anatomy.causal and (mask is None or mask.ndim == 2 or call.plain_mask)
    return Step(request, record.base, start, plain, plan.name, tower=call.tower, order=_image_order(inputs))


def with_forward(
    kwargs: dict[str, Any], passing: Forward | None, family: Family, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a model's forward with ours, on which the methods see all rows of a prompt."""
    if (
        passing is not None
        and family.leaves_rows_out
        and any(part.step is not None or part.watch is not None for part in passing.parts)
    ):
        kwargs = compat.with_all_rows(kwargs, inputs)
    return {**kwargs, FORWARD: passing}


def _full_mask(inputs: dict[str, Any]) -> Tensor | None:
    """The mask of layers that see everything, where there is one for each kind of layer."""
    mask = inputs.get("attention_mask")
    return mask.get("full_attention") if isinstance(mask, dict) else mask


def _board(cache: Any, request: Request, plan: Plan, window: int) -> None:
    """Put the request on its cache.

    Raises:
        UnsupportedError: a ring of slots, of which the host does not know which tokens it holds.
    """
    ride(cache, request, plan)
    if plan.extending or plan.policies:
        follow_beams(cache)
    if window and compat.rings(cache, window):
        raise UnsupportedError(
            f"a static cache outgrows the sliding window of {window} tokens; use a dynamic cache, or fewer tokens"
        )


def _read(
    record: Record, model: PreTrainedModel, call: Call, inputs: dict[str, Any], request: Request, start: int, mask: Any
) -> None:
    """Let the request read the new tokens of a prompt."""
    plan = call.plan
    if call.ahead is not None:
        tokens = _tokens_of(inputs)
        assert tokens is not None
        begun, real = call.ahead.entered > 0, None if mask is None else _real_keys(mask)
        call.ahead.read(request, start + tokens.shape[1], real, call.prompt_length, len(tokens))
        if plan.uses_turns and record.turns is not None and not begun:
            request.find_turns(record.turns, ", ".join(plan.turns))
        return
    if record.anatomy.leading:
        types = _leading_types(record.anatomy.leading, start, inputs)
    else:
        types = record.family.types_of_call(model, inputs)
    images = record.family.image_numbers(model, {**call.sizes, **inputs}, types, record.marker_ids)
    real = None if mask is None else _real_keys(mask)
    request.extend(start, types, images, real, call.prompt_length, inputs.get("input_ids"))
    if plan.uses_turns and record.turns is not None and (request.has_images or plan.texts):
        request.find_turns(record.turns, ", ".join(plan.turns))
    if plan.drops:
        check_prompt(request, plan.name)


def _read_before(
    record: Record,
    model: PreTrainedModel,
    call: Call,
    inputs: dict[str, Any],
    noted: Request | None,
    start: int,
    rows: int,
) -> Request:
    """The request of a cache that was filled without the recipe, where that makes no difference: with text.

    ``noted``: the text, if it was read by this model while it was wrapped.

    Raises:
        StateError: there is more in it, or nobody knows; the recipe looks at every token as it is read.
    """
    ids, filled, mask = call.ids, "this cache was filled without vlmattn", inputs.get("attention_mask")
    if noted is not None and (given := inputs.get("input_ids")) is not None:
        ids, filled = torch.cat([noted.ids(start, given.device), given], 1), "this cache has text that was read bare"
    told = record.family.placeholders(model) and not record.anatomy.leading  # by token ids
    if not told or not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape[1] <= start:
        raise StateError(
            f"{filled}, and its tokens are not known; start a new generate() with all of them, and a new cache"
        )
    ids = ids[:, :start].repeat_interleave(rows // len(ids), 0)
    types = record.family.token_types(model, ids)
    if bool((types != TEXT).any()):
        raise StateError(f"{filled}, with images; start a new generate() with the whole conversation, and a new cache")
    if call.plan.edits_text:
        raise StateError(
            f"{filled}, and '{call.plan.name}' must see every token as it is read; start a new generate() with the"
            " whole conversation, and a new cache"
        )
    request = Request(len(call.plan.by_layer), counts=call.plan.drops)
    real = None if mask is None else _real_keys(mask)[:, :start]
    request.extend(0, types, torch.full_like(types, -1, dtype=torch.int16), real, None, ids)
    return request


def _untouched(request: Request, before: Plan, plan: Plan) -> bool:
    """Nothing was read, under another plan than this one, but text, as the bare model reads it."""
    if before is plan or before == plan:
        return False
    return not request.has_images and not before.edits_text and bool(before.by_layer)


def _check_request(request: Request, before: Plan, plan: Plan, batch: int) -> None:
    """A cache belongs to the recipe and the batch that filled it."""
    if request.batch not in (None, batch):
        raise StateError(
            f"this cache was filled by a batch of {request.batch} and now meets {batch}; start a new generate()"
        )
    if before != plan:
        raise StateError(
            f"this cache was filled with recipe '{before.name}' and cannot go on with '{plan.name}'; start a new"
            " generate()"
        )


def _refuse_text(request: Request, call: Call) -> None:
    """Raise for a prompt without images, unless the recipe is about text or they may follow later."""
    plan = call.plan
    if request.has_images or plan.texts or (plan.text_first and call.given_cache):
        return
    if plan.text_first:
        later = f"if images follow later, give this prompt a cache to go on from: {compat.cache_name()}=DynamicCache()"
    else:
        later = f"'{plan.name}' cannot go on from their cache: when images follow, give the conversation as one prompt"
    raise InputError(
        "no image tokens in the prompt; put the image placeholder into it (processor.apply_chat_template does), or"
        f" call model.vlmattn.disable() for prompts without images; {later}"
    )


def _uses_cache(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether the decoder is going to make a cache itself."""
    wanted = inputs.get("use_cache")
    return bool(model.config.get_text_config().use_cache if wanted is None else wanted)


def _leading_types(count: int, start: int, inputs: dict[str, Any]) -> Tensor:
    """Types of tokens of which the first ``count`` real ones stand for the image."""
    embeds = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"][..., None]
    mask = inputs.get("attention_mask")
    types = torch.full(embeds.shape[:2], TEXT, dtype=torch.uint8, device=embeds.device)
    if start == 0:
        real = torch.ones_like(types) if mask is None else mask[:, : types.shape[1]].long()
        types[(real.cumsum(1) <= count) & (real != 0)] = IMAGE
    return types


def _image_order(inputs: dict[str, Any]) -> list[int] | None:
    """Which encoded image each of the prompt is (beams get the same tensors again); None = by the rows they are in."""
    seen: dict[int, int] = {}
    every = []
    for found in compat.encoded_images(inputs):
        if isinstance(found, Tensor):  # of equal images: repeated ones are copies
            return None
        every += [] if found is None else list(found)
    for features in every:
        seen.setdefault(features.data_ptr(), len(seen))
    return [seen[features.data_ptr()] for features in every] or None


def _real_keys(mask: Tensor) -> Tensor:
    """bool ``[batch, keys]``: which keys are not padding, from a 2D mask or one that is already 4D (static cache)."""
    if mask.ndim == 2:
        return mask != 0
    return visible(mask).any(dim=(1, 2))


def refuse_packing(inputs: dict[str, Any]) -> None:
    """Raise for several sequences in one row, which would be edited as if they were one."""
    if compat.paged(inputs):
        raise UnsupportedError("continuous batching cannot be edited; use generate()")
    positions = inputs.get("position_ids")
    alone = inputs.get("attention_mask") is None and compat.cache_of(inputs) is None
    if alone and isinstance(positions, Tensor) and positions.ndim == 2 and bool((positions.diff(dim=1) != 1).any()):
        raise UnsupportedError(
            "packed sequences (position_ids that start anew) cannot be edited; give them as a padded batch"
        )
