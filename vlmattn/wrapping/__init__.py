"""Puts a recipe on one model object and takes it off again.

The object stays the same and keeps its class. While wrapped it has: another name of the attention implementation in
its text config, forward hooks on the model, its decoder, the decoder's layers and the vision tower, and four attributes
of the instance (``vlmattn`` and its own ``generate``, ``prepare_inputs_for_generation`` and ``save_pretrained``). ``unwrap``
removes all of them.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn import attention, compat
from vlmattn.errors import InputError, StateError, UnsupportedError
from vlmattn.files import beside, copy_whole
from vlmattn.models import Generic, find_family
from vlmattn.recipe import FILE_NAME, Recipe
from vlmattn.request import Plan
from vlmattn.wrapping.branch_cache import forget_branches, merged_of
from vlmattn.wrapping.branches import fan_of, setting_of
from vlmattn.wrapping.call import CALL, Call
from vlmattn.wrapping.drafting import drafting_plan, is_drafting, refuse_drafts
from vlmattn.wrapping.handle import WRAPPED, WRAPPING, Handle, handle_of
from vlmattn.wrapping.hooks import install_hooks, step_of
from vlmattn.wrapping.instead import Instead
from vlmattn.wrapping.search import refuse_ways, row_by_row, searching
from vlmattn.wrapping.self_check import check_reached

__all__ = ["Handle", "applied", "borrowed", "handle_of", "install", "unwrap", "wrap"]

_M = TypeVar("_M", bound=nn.Module)


def wrap(model: _M, recipe: Any = None, *, processor: Any = None, **options: Any) -> _M:
    """Put a recipe on a model, in place, and return the model.

    Args:
        model: a supported ``PreTrainedModel`` (``vlmattn.supported_families()``), with sdpa or eager attention, or a PEFT model
            around one.
        recipe: a preset (``"var"``), presets joined by ``+``, a recipe file, a method, or a list of methods. None
            looks for the recipe that was saved beside the model.
        processor: the model's processor or tokenizer, for methods that must know where the user's turn ends (``mma``,
            ``gift``, ...); None looks for it in the folder that the model came from, when a method needs it.
        options: fields of the method, e.g. ``wrap(model, "pai", alpha=.3)``.

    Raises:
        UnsupportedError: a model whose attention cannot be edited, or another attention implementation.
        StateError: the model is already wrapped.
        UnknownNameError, OptionError: no such preset or option, a value out of range.
    """
    compat.warn_if_untested()
    given, model = model, _within_peft(model)
    family = find_family(model)
    assert isinstance(model, PreTrainedModel)
    with WRAPPING:
        if (old := handle_of(model)) is not None:
            raise StateError(
                f"the model is already wrapped with '{old.recipe.name}'; use model.vlmattn.set(...) or vlmattn.unwrap(model) first"
            )
        chosen = Recipe.of(_saved_recipe(given) if recipe is None else recipe, **options)
        text = model.config.get_text_config()
        base = _base_name(text._attn_implementation)
        # every check of the recipe is before the first change
        handle = Handle(chosen, family.anatomy(model), family, base, text, processor)
        if handle.now.plan.acts:
            _refuse_while_it_generates(model, family.entry(model))
        attention.register()
        model.set_attn_implementation({"text_config": attention.NAMES[base]})
        if text._attn_implementation != attention.NAMES[base]:
            raise UnsupportedError(
                f"{type(model).__name__} does not let its attention be replaced; supported: models of transformers itself"
            )
        WRAPPED.add(handle)
        model.__dict__["vlmattn"] = family.entry(model).__dict__["vlmattn"] = handle
        handle._instead = [Instead(model, name, function) for name, function in _INSTANCE_METHODS.items()]
        if given is not model:
            handle._instead.append(Instead(given, "save_pretrained", _save_pretrained))
        handle._hooks = install_hooks(handle, model)
    if isinstance(family, Generic) or not type(model).__module__.startswith("transformers."):
        try:
            check_reached(family, model, base)
        except UnsupportedError:
            unwrap(model)
            raise
    return given


def unwrap(model: _M) -> _M:
    """Take the recipe off and return the model, as it was before ``wrap`` bit for bit.

    Raises:
        StateError: the model is not wrapped, or it is generating (in another thread, or in this one).
    """
    given, model = model, _within_peft(model)
    with WRAPPING:
        handle = handle_of(model)
        if handle is None:
            raise StateError("the model is not wrapped")
        assert isinstance(model, PreTrainedModel)
        handle.retire()
        for hook in handle._hooks:
            hook.remove()
        for method in handle._instead:
            method.remove()
        handle._family.entry(model).__dict__.pop("vlmattn", None)
        model.__dict__.pop("vlmattn", None)
        WRAPPED.discard(handle)
        shared = any(other._text is handle._text for other in WRAPPED)
        if (
            not shared and handle._text._attn_implementation in attention.NAMES.values()
        ):  # the user may have set another
            model.set_attn_implementation({"text_config": handle._base})
    return given


@contextmanager
def applied(model: _M, recipe: Any, *, processor: Any = None, **options: Any) -> Iterator[_M]:
    """``with applied(model, "var"): ...`` wraps for the block and unwraps after it, also when it raises."""
    wrap(model, recipe, processor=processor, **options)
    try:
        yield model
    finally:
        unwrap(model)


@contextmanager
def borrowed(model: nn.Module, processor: Any = None) -> Iterator[Handle]:
    """The handle of a model, which is wrapped with the recipe "none" for the block if it is not wrapped: for reading along.

    Other threads go on meanwhile, bare or wrapped, and may borrow it too.
    """
    model = _within_peft(model)
    with WRAPPING:
        if (handle := handle_of(model)) is None:
            handle = handle_of(wrap(model, "none", processor=processor))
            assert handle is not None
            handle._guests += 1
        elif handle._guests:
            handle._guests += 1
        borrows = handle._guests > 0
    try:
        yield handle
    finally:
        with WRAPPING:
            handle._guests -= borrows
            if borrows and not handle._guests and handle_of(model) is handle:
                unwrap(model)


def install() -> None:
    """Opt in to the method form: ``model.wrap("var")`` and ``model.unwrap()`` on every ``PreTrainedModel``."""
    PreTrainedModel.wrap = wrap
    PreTrainedModel.unwrap = unwrap


def _within_peft(model: Any) -> Any:
    """The model within a PEFT model; else the model."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _base_name(implementation: str | None) -> str:
    """The attention implementation to fall back on, also when another model that shares the config is wrapped."""
    for base, name in attention.NAMES.items():
        if implementation in (base, name):
            return base
    raise UnsupportedError(
        f"attention implementation '{implementation}' cannot be edited; load the model with attn_implementation='sdpa'"
        " (which runs flash kernels on a GPU) or 'eager'"
    )


def _saved_recipe(given: Any) -> Recipe:
    """The recipe that was saved beside the model, in its folder or on the hub."""
    model = _within_peft(given)
    name, remedy = model.name_or_path, "give a preset"
    if given is not model:
        remedy += ", or the folder of the adapter, which PEFT does not tell: wrap(model, folder)"
    found = beside(name, FILE_NAME) if name else None
    if found is None:
        which = f"'{name}' has none" if name else "this one is from no folder"
        raise InputError(f"wrap(model) without a recipe looks for {FILE_NAME} beside the model, and {which}; {remedy}")
    return Recipe.from_pretrained(found.parent)


def _refuse_while_it_generates(*models: nn.Module) -> None:
    """Raise if a bare model is generating: its next tokens would be edited, and its first ones were not."""
    running = {
        inspect.unwrap(type(model).generate).__code__: model for model in models if isinstance(model, PreTrainedModel)
    }
    for frame in sys._current_frames().values():
        caller: Any = frame
        while caller is not None:
            if caller.f_code in running and caller.f_locals.get("self") is running[caller.f_code]:
                raise StateError(
                    "the model is generating, and wrapping would change its answer; wrap it when that is done"
                )
            caller = caller.f_back


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
    handle = handle_of(self)
    if handle is None:  # unwrapped a moment ago, by another thread
        return original(*args, **kwargs)
    names = list(inspect.signature(type(self).generate).parameters)[1:]
    kwargs |= dict(zip(names, args, strict=False))
    now, entered = handle.now, False
    streamer, resting = kwargs.get("streamer"), preset is None and not now.enabled
    try:
        plan = now.acting if preset is None else handle.plan_of(Recipe.of(preset))
        if is_drafting(kwargs):
            plan = drafting_plan(plan)
        if plan.acts and not (entered := handle.enter("generate")):
            return original(**kwargs)
        refuse_drafts(self, plan, kwargs)
        forget_branches(compat.cache_of(kwargs))
        fan = fan_of(self, plan, kwargs, {} if resting or branch_inputs is None else branch_inputs)
        if plan.search is not None:
            kwargs = _searched(self, plan, kwargs)
        if not plan.is_identity or fan is not None:
            _refuse_chunks(self, kwargs)
        mask = kwargs.get("attention_mask")
        call = Call(
            handle, self, plan, _prompt_length(kwargs), mask is None or mask.ndim == 2, fan=fan, ledger=now.ledger,
            ids=kwargs.get("inputs", kwargs.get("input_ids")), given_cache=compat.cache_of(kwargs) is not None,
        )  # fmt: skip
        token = CALL.set(call)
        try:
            out = original(**kwargs)
        finally:
            CALL.reset(token)
        if plan.search is not None and streamer is not None:
            streamer.put(getattr(out, "sequences", out)[0, call.prompt_length :].cpu())  # known only now
            streamer.end()
    except BaseException as error:
        if streamer is not None and not _came_from(error, type(streamer).end):
            streamer.end()  # whoever reads from it in another thread would wait for ever
        raise
    finally:
        if entered:
            handle.leave("generate")
    if preset is None and not (plan.is_identity and fan is None):
        now.warn_if_idle()
    return out


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
    handle = handle_of(self)
    cache, call = compat.cache_of(kwargs), CALL.get()
    merged = merged_of(cache)
    if merged is not None:
        input_ids, kwargs = merged.expand(input_ids, kwargs)
    elif call is not None and call.model is self and call.fan is not None:
        # while the prompt is read, the cache of the call is empty and no mask may be made for it
        return compat.with_cache(original(input_ids, *args, **compat.with_cache(kwargs, None, self)), cache, self)
    inputs = original(input_ids, *args, **kwargs)
    if call is not None and call.model is self and handle is call.handle and not kwargs.get("is_first_iteration"):
        inputs[attention.STEP] = step_of(handle, self, call, inputs)  # here, because the forward may be compiled
    return inputs


def _refuse_chunks(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    if setting_of(model, kwargs, "prefill_chunk_size"):
        raise UnsupportedError("edits and decoding rules need the prompt in one piece; set prefill_chunk_size=None")


def _prompt_length(kwargs: dict[str, Any]) -> int | None:
    """Slots of the prompt of a generate() call, past turns in the cache included."""
    for value in map(kwargs.get, ("attention_mask", "input_ids", "inputs", "inputs_embeds")):
        if isinstance(value, Tensor) and value.ndim >= 2:
            return value.shape[1]
    return None


def _save_pretrained(
    self: Any, original: Callable[..., Any], save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """``save_pretrained`` of a wrapped model, or of the PEFT model around it: what the bare one writes, and the recipe beside it."""
    handle = handle_of(_within_peft(self))
    if handle is None:
        return original(save_directory, *args, **kwargs)
    now = handle.now
    now.recipe.to_dict()  # what cannot be written is an error before anything is
    out = original(save_directory, *args, **kwargs)
    for method in {method for methods in now.plan.by_layer for method in methods}:
        for key, name in getattr(method, "files", {}).items():  # what was found beside this model goes with it
            if getattr(method, key):
                copy_whole(getattr(method, key), Path(save_directory) / name)
    now.recipe.save_pretrained(save_directory)
    return out


# What an instance has instead of methods of its class, while it is wrapped.
_INSTANCE_METHODS: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "prepare_inputs_for_generation": _prepare_inputs,
    "save_pretrained": _save_pretrained,
}
