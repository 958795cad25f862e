"""Puts a recipe on one model object and takes it off again.

The object stays the same and keeps its class. While wrapped it has: another name of the attention implementation in
its text config, forward hooks on the model, its decoder, the decoder's layers and the vision tower, and attributes of
the instance: ``vlmattn`` and methods of its own (``INSTANCE_METHODS``: ``generate`` and what belongs to it).
``unwrap`` removes all of them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.errors import InputError, StateError, UnsupportedError
from vlmattn.files import beside
from vlmattn.models import Generic, find_family
from vlmattn.recipe import FILE_NAME, Recipe
from vlmattn.wrapping.generate import INSTANCE_METHODS, save_pretrained
from vlmattn.wrapping.handle import Handle, handle_of, record_of, within_peft
from vlmattn.wrapping.hooks import install_hooks
from vlmattn.wrapping.instead import Instead
from vlmattn.wrapping.record import WRAPPED, WRAPPING, Record
from vlmattn.wrapping.registration import NAMES, base_name, is_plain, refuse_base, register
from vlmattn.wrapping.self_check import check_reached

__all__ = ["Handle", "Record", "applied", "borrowed", "handle_of", "install", "record_of", "unwrap", "wrap"]

_M = TypeVar("_M", bound=nn.Module)


def wrap(model: _M, recipe: Any = None, *, processor: Any = None, **options: Any) -> _M:
    """Put a recipe on a model, in place, and return the model.

    Args:
        model: a supported ``PreTrainedModel`` (``vlmattn.supported_families()``), or a PEFT model around one. Its
            attention (sdpa, eager, flash_attention_2, flex_attention, ...) goes on in calls without an edit.
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
    given, model = model, within_peft(model)
    family = find_family(model)
    assert isinstance(model, PreTrainedModel)
    with WRAPPING:
        if (old := handle_of(model)) is not None:
            raise StateError(
                f"the model is already wrapped with '{old.recipe.name}'; use model.vlmattn.set(...) or"
                " vlmattn.unwrap(model) first"
            )
        chosen = Recipe.of(_saved_recipe(given) if recipe is None else recipe, **options)
        text = model.config.get_text_config()
        base = base_name(compat.attention_name(text))
        # every check of the recipe is before the first change
        anatomy = family.anatomy(model)
        refuse_base(base, anatomy.family, bool(anatomy.cross))
        record = Record(chosen, anatomy, family, base, text, processor)
        if record.now.plan.acts:
            _refuse_while_it_generates(model, family.entry(model))
        register(base)
        compat.set_attention_name(model, NAMES[base], is_plain(base))
        if compat.attention_name(text) != NAMES[base]:
            raise UnsupportedError(
                f"{type(model).__name__} does not let its attention be replaced; supported: models of transformers"
                " itself"
            )
        WRAPPED.add(record)
        model.__dict__["vlmattn"] = family.entry(model).__dict__["vlmattn"] = Handle(record)
        record.instead = [Instead(model, name, function) for name, function in INSTANCE_METHODS.items()]
        if given is not model:
            record.instead.append(Instead(given, "save_pretrained", save_pretrained))
        record.hooks = install_hooks(record, model)
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
    given, model = model, within_peft(model)
    with WRAPPING:
        record = record_of(model)
        if record is None:
            raise StateError("the model is not wrapped")
        assert isinstance(model, PreTrainedModel)
        record.retire()
        for hook in record.hooks:
            hook.remove()
        for method in record.instead:
            method.remove()
        record.family.entry(model).__dict__.pop("vlmattn", None)
        model.__dict__.pop("vlmattn", None)
        WRAPPED.discard(record)
        shared = any(other.text is record.text for other in WRAPPED)
        if not shared and compat.attention_name(record.text) in NAMES.values():  # the user may have set another
            compat.set_attention_name(model, record.base, is_plain(record.base))
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
def borrowed(model: nn.Module, processor: Any = None) -> Iterator[Record]:
    """The record of a model for reading along; a bare model is wrapped with the recipe "none" for the block.

    Other threads go on meanwhile, bare or wrapped, and may borrow it too.
    """
    model = within_peft(model)
    with WRAPPING:
        if (record := record_of(model)) is None:
            record = record_of(wrap(model, "none", processor=processor))
            assert record is not None
            record.guests += 1
        elif record.guests:
            record.guests += 1
        borrows = record.guests > 0
    try:
        yield record
    finally:
        with WRAPPING:
            record.guests -= borrows
            if borrows and not record.guests and record_of(model) is record:
                unwrap(model)


def install() -> None:
    """Opt in to the method form: ``model.wrap("var")`` and ``model.unwrap()`` on every ``PreTrainedModel``."""
    PreTrainedModel.wrap = wrap
    PreTrainedModel.unwrap = unwrap


def _saved_recipe(given: Any) -> Recipe:
    """The recipe that was saved beside the model, in its folder or on the hub."""
    model = within_peft(given)
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
