"""What a wrapped model has in place of ``generate``, ``prepare_inputs_for_generation`` and ``save_pretrained``."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.errors import UnsupportedError
from vlmattn.files import copy_whole
from vlmattn.models import about_images
from vlmattn.recipe import Recipe
from vlmattn.request import NO_PLAN, Plan
from vlmattn.wrapping.ahead import read_ahead
from vlmattn.wrapping.branch_cache import branches_on, forget_branches
from vlmattn.wrapping.branch_checks import branches_of
from vlmattn.wrapping.call import CALL, Call
from vlmattn.wrapping.drafting import drafting_plan, refuse_drafts
from vlmattn.wrapping.handle import record_of, within_peft
from vlmattn.wrapping.record import Record
from vlmattn.wrapping.registration import refuse_mask
from vlmattn.wrapping.search import refuse_ways, row_by_row, searching
from vlmattn.wrapping.steps import forward_of, with_forward
from vlmattn.wrapping.text_alone import answers_bare


def _generate(
    self: PreTrainedModel,
    original: Callable[..., Any],
    *args: Any,
    preset: Any = None,
    branch_inputs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """``generate`` of a wrapped model.

    Args:
        preset: another recipe, in force for this call only.
        branch_inputs: inputs of branches that the recipe leaves to the caller, by branch and input:
            ``{"augmented": {"pixel_values": ...}}``.
    """
    record = record_of(self)
    if record is None:  # unwrapped a moment ago, by another thread
        return original(*args, **kwargs)
    names = list(inspect.signature(type(self).generate).parameters)[1:]
    kwargs |= dict(zip(names, args, strict=False))
    now, entered = record.now, False
    try:
        with _ended_on_error(kwargs.get("streamer")):
            plan, resting = _plan(record, preset, kwargs), preset is None and not now.enabled
            if answers_bare(record, self, plan, kwargs):
                now.warn_of_text(plan.name)
                plan, resting = NO_PLAN, True
            if plan.acts and not (entered := record.enter("generate")):
                return original(**kwargs)
            call, kwargs = _begun(record, self, plan, kwargs, {} if resting or branch_inputs is None else branch_inputs)
            token = CALL.set(call)
            try:
                out = original(**kwargs)
            finally:
                CALL.reset(token)
            if plan.search is not None and (streamer := kwargs.get("streamer")) is not None:
                streamer.put(getattr(out, "sequences", out)[0, call.prompt_length :].cpu())  # known only now
                streamer.end()
    finally:
        if entered:
            record.leave("generate")
    if preset is None and not (plan.is_identity and call.branches is None):
        now.warn_if_idle()
    return out


def _plan(record: Record, preset: Any, kwargs: dict[str, Any]) -> Plan:
    """What acts in a call."""
    plan = record.now.acting if preset is None else record.plan_of(Recipe.of(preset))
    return drafting_plan(plan) if compat.is_drafting(kwargs) else plan


def _begun(
    record: Record, model: PreTrainedModel, plan: Plan, kwargs: dict[str, Any], given: Mapping[str, Any]
) -> tuple[Call, dict[str, Any]]:
    """The call with these arguments, and those for the library's generate(); ``given``: inputs of branches."""
    refuse_drafts(model, plan, kwargs, record.anatomy.attending is not None and not record.anatomy.cross)
    forget_branches(compat.cache_of(kwargs))
    branches = branches_of(model, plan, kwargs, given)
    if plan.search is not None:
        kwargs = _searched(model, plan, kwargs)
    acts = not plan.is_identity or branches is not None
    ahead = read_ahead(record, model, plan, kwargs) if acts else None
    mask = kwargs.get("attention_mask")
    refuse_mask(record.base, mask)
    call = Call(
        record, model, plan, _prompt_length(kwargs), mask is None or mask.ndim == 2, branches=branches,
        ledger=record.now.ledger, ids=kwargs.get("inputs", kwargs.get("input_ids")),
        sizes=about_images(kwargs),
        given_cache=compat.cache_of(kwargs) is not None, ahead=ahead,
    )  # fmt: skip
    return call, kwargs


@contextmanager
def _ended_on_error(streamer: Any) -> Iterator[None]:
    """End a streamer when the call fails: whoever reads from it in another thread would wait for ever."""
    try:
        yield
    except BaseException as error:
        if streamer is not None and not _came_from(error, type(streamer).end):
            streamer.end()
        raise


def _came_from(error: BaseException, function: Any) -> bool:
    """Whether the error was raised within a function."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code is getattr(function, "__code__", None) for frame in frames)


def _searched(model: PreTrainedModel, plan: Plan, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a generate() call in which a search method chooses the tokens."""
    refuse_ways(model, plan.rule, kwargs)
    decode, allowed = searching(plan.search, kwargs), row_by_row(kwargs.get("prefix_allowed_tokens_fn"))
    return {**kwargs, "do_sample": False, "custom_generate": decode, "prefix_allowed_tokens_fn": allowed}


def _prepare_inputs(
    self: PreTrainedModel, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """``prepare_inputs_for_generation`` of a wrapped model: rows of branches come along."""
    record = record_of(self)
    cache, call = compat.cache_of(kwargs), CALL.get()
    on_cache = branches_on(cache)
    if on_cache is not None:
        input_ids, kwargs = on_cache.expand(input_ids, kwargs)
    elif call is not None and call.model is self and call.branches is not None:
        # while the prompt is read, the cache of the call is empty and no mask may be made for it
        return compat.with_cache(original(input_ids, *args, **compat.with_cache(kwargs, None, self)), cache, self)
    inputs = original(input_ids, *args, **kwargs)
    if call is not None and call.model is self and record is call.record and not kwargs.get("is_first_iteration"):
        passing = forward_of(record, self, call, inputs)  # here, because the forward may be compiled
        inputs = with_forward(inputs, passing, record.family, inputs)
    return inputs


def _prompt_length(kwargs: dict[str, Any]) -> int | None:
    """Slots of the prompt of a generate() call, past turns in the cache included."""
    for value in map(kwargs.get, ("attention_mask", "input_ids", "inputs", "inputs_embeds")):
        if isinstance(value, Tensor) and value.ndim >= 2:
            return value.shape[1]
    return None


def save_pretrained(
    self: Any, original: Callable[..., Any], save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """``save_pretrained`` of a wrapped model, or of the PEFT model around it; it writes the recipe too."""
    record = record_of(within_peft(self))
    if record is None:
        return original(save_directory, *args, **kwargs)
    now = record.now
    now.recipe.to_dict()  # what cannot be written is an error before anything is
    out = original(save_directory, *args, **kwargs)
    for method in {method for methods in now.plan.by_layer for method in methods}:
        for key, name in getattr(method, "files", {}).items():  # what was found beside this model goes with it
            if getattr(method, key):
                copy_whole(getattr(method, key), Path(save_directory) / name)
    now.recipe.save_pretrained(save_directory)
    return out


def _init_continuous_batching(self: PreTrainedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Refused: it reads texts alone, all in one row, and has the attention that the model was loaded with."""
    if (record := record_of(self)) is None:  # unwrapped a moment ago, by another thread
        return original(*args, **kwargs)
    raise UnsupportedError(
        f"transformers' continuous batching takes no images, and texts share one row, which '{record.now.recipe.name}'"
        " cannot edit; use generate() with a batch, or vlmattn.unwrap(model) first"
    )


#: What an instance has instead of methods of its class, while it is wrapped.
INSTANCE_METHODS: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "prepare_inputs_for_generation": _prepare_inputs,
    "save_pretrained": save_pretrained,
    "init_continuous_batching": _init_continuous_batching,
}
