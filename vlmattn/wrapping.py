"""Puts a recipe on one model object and takes it off again.

The object stays the same and keeps its class. While wrapped it has: another name of the attention implementation in
its text config, forward hooks on the model, its decoder and the decoder's layers, and three attributes of the instance
(``vlmattn``, ``generate``, ``save_pretrained``). ``unwrap`` removes all of them.
"""

from __future__ import annotations

import inspect
import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn import attention
from vlmattn.errors import InputError, StateError, UnsupportedError
from vlmattn.models import Anatomy, Family, find_family
from vlmattn.recipe import FILE_NAME, Recipe
from vlmattn.request import Ledger, Plan, Preparation, Request, Scope, Step, number_images

_M = TypeVar("_M", bound=nn.Module)
_REQUEST = "_vlmattn_request"  # where a request rides on its cache
_INSTANCE_METHODS = ("generate", "save_pretrained")


@dataclass(frozen=True)
class _Call:
    """One generate() call in progress: its recipe, the length of its prompt, and whether its mask is only padding."""

    handle: Handle
    plan: Plan
    prompt_length: int | None
    plain_mask: bool
    token: object = field(
        default_factory=object
    )  # what a request remembers of the call (never the handle or the model)


# Which generate() call of which model runs in this thread. Only the model's pre-hook reads it, to hand the plan and the
# prompt length to the request; without a cache (use_cache=False) every forward makes a request of its own from it.
_CALL: ContextVar[_Call | None] = ContextVar("vlmattn_call", default=None)

# Wrapped models by text config: two models may share one config object, and the last one out restores its setting.
_WRAPPED: dict[int, weakref.WeakSet[nn.Module]] = {}


class Handle:
    """``model.vlmattn``: what is on the model, and what it did.

    Attributes:
        recipe: the recipe in force.
        anatomy: sizes of the decoder.
    """

    def __init__(self, recipe: Recipe, anatomy: Anatomy, family: Family, base: str) -> None:
        self.anatomy, self._family, self._base = anatomy, family, base
        self._enabled = True
        self._plans: dict[Recipe, Plan] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._originals: dict[str, Any] = {}
        self.set(recipe)

    def set(self, recipe: Any, **options: Any) -> None:
        """Put another recipe in force, from the next prompt on; ``report()`` starts anew."""
        self.recipe = Recipe.of(recipe, **options)
        self._plan = self.plan_of(self.recipe)
        self._ledger, self._warned = Ledger(), False

    def plan_of(self, recipe: Recipe) -> Plan:
        if recipe not in self._plans:
            self._plans[recipe] = recipe.bind(self.anatomy)
        return self._plans[recipe]

    def enable(self) -> None:
        """Let the recipe act again, from the next prompt on."""
        self._enabled = True

    def disable(self) -> None:
        """Let the bare model answer, from the next prompt on; hooks stay in place."""
        self._enabled = False

    @property
    def enabled(self) -> bool:
        return self._enabled

    @property
    def active_plan(self) -> Plan:
        return self._plan if self._enabled else Plan("none")

    def report(self) -> dict[str, Any]:
        """What happened since the recipe was put in force.

        Returns:
            ``recipe``; ``fired``: how often each method found something to do (var: sink tokens, vhr: heads chosen,
            pai: attention calls edited); ``backends``: phase -> backend -> number of attention calls; ``layers``: phase -> backend
            -> the layers it ran in. ``base:`` names the model's own attention.
        """
        backends: dict[str, dict[str, int]] = {}
        layers: dict[str, dict[str, list[int]]] = {}
        for (phase, backend, layer), count in self._ledger.read("calls").items():
            row = backends.setdefault(phase, {})
            row[backend] = row.get(backend, 0) + count
            layers.setdefault(phase, {}).setdefault(backend, []).append(int(layer))
        fired = dict.fromkeys((method.info.name for method in self.recipe.interventions), 0)
        fired |= {name: count for (name,), count in self._ledger.read("fired").items()}
        for row_of_layers in layers.values():
            for found in row_of_layers.values():
                found.sort()
        return {
            "recipe": self.recipe.to_dict(),
            "enabled": self._enabled,
            "fired": fired,
            "backends": backends,
            "layers": layers,
        }

    def warn_if_idle(self) -> None:
        """Say once if a method of the recipe has not found anything to do."""
        if self._warned or not self._enabled:
            return
        self._warned = True  # one look: reading the counts waits for the device
        idle = [name for name, count in self.report()["fired"].items() if not count]
        if idle:
            warnings.warn(
                f"vlmattn: {', '.join(idle)} never fired in this generate() call and had no part in the answer;"
                " see model.vlmattn.report()",
                stacklevel=3,
            )

    def __repr__(self) -> str:
        return f"<vlmattn '{self.recipe.name}' on {self.anatomy.family}, {'enabled' if self._enabled else 'disabled'}>"


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a wrapped model, else None."""
    handle = model.__dict__.get("vlmattn")
    return handle if isinstance(handle, Handle) else None


def wrap(model: _M, recipe: Any = None, **options: Any) -> _M:
    """Put a recipe on a model, in place, and return the model.

    Args:
        model: a supported ``PreTrainedModel`` (``vlmattn.supported_families()``), with sdpa or eager attention.
        recipe: a preset (``"var"``), presets joined by ``+``, a recipe file, a method, or a list of methods. None
            looks for the recipe that was saved beside the model.
        options: fields of the method, e.g. ``wrap(model, "pai", alpha=.3)``.

    Raises:
        UnsupportedError: another family, or another attention implementation.
        StateError: the model is already wrapped.
        UnknownNameError, OptionError: no such preset or option, a value out of range.
    """
    family = find_family(model)
    assert isinstance(model, PreTrainedModel)
    if (old := handle_of(model)) is not None:
        raise StateError(
            f"the model is already wrapped with '{old.recipe.name}'; use model.vlmattn.set(...) or vlmattn.unwrap(model) first"
        )
    chosen = Recipe.of(_saved_recipe(model) if recipe is None else recipe, **options)
    text = model.config.get_text_config()
    base = _base_name(text._attn_implementation)
    handle = Handle(chosen, family.anatomy(model), family, base)  # every check of the recipe is before the first change
    attention.register()
    model.set_attn_implementation({"text_config": attention.NAMES[base]})
    if text._attn_implementation != attention.NAMES[base]:
        raise UnsupportedError(
            f"{type(model).__name__} does not let its attention be replaced; supported: models of transformers itself"
        )
    _WRAPPED.setdefault(id(text), weakref.WeakSet()).add(model)
    handle._originals = {name: model.__dict__[name] for name in _INSTANCE_METHODS if name in model.__dict__}
    model.__dict__["vlmattn"] = handle
    model.__dict__["generate"] = MethodType(_generate, model)
    model.__dict__["save_pretrained"] = MethodType(_save_pretrained, model)
    decoder = family.decoder(model)
    hooks = [
        model.register_forward_pre_hook(_before_model, with_kwargs=True),
        model.register_forward_hook(_after_model, with_kwargs=True),
        decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True),
    ]
    hooks += [layer.register_forward_pre_hook(_before_layer, with_kwargs=True) for layer in family.layers(model)]
    handle._hooks = hooks
    return model


def unwrap(model: _M) -> _M:
    """Take the recipe off and return the model, as it was before ``wrap`` bit for bit.

    Raises:
        StateError: the model is not wrapped.
    """
    handle = handle_of(model)
    if handle is None:
        raise StateError("the model is not wrapped")
    assert isinstance(model, PreTrainedModel)
    for hook in handle._hooks:
        hook.remove()
    for name in _INSTANCE_METHODS:
        del model.__dict__[name]
    model.__dict__.update(handle._originals)
    del model.__dict__["vlmattn"]
    text = model.config.get_text_config()
    others = _WRAPPED.get(id(text), weakref.WeakSet())
    others.discard(model)
    if not others:
        _WRAPPED.pop(id(text), None)
        if text._attn_implementation in attention.NAMES.values():  # not if the user has set another one since
            model.set_attn_implementation({"text_config": handle._base})
    return model


@contextmanager
def applied(model: _M, recipe: Any, **options: Any) -> Iterator[_M]:
    """``with applied(model, "var"): ...`` wraps for the block and unwraps after it, also when it raises."""
    wrap(model, recipe, **options)
    try:
        yield model
    finally:
        unwrap(model)


def install() -> None:
    """Opt in to the method form: ``model.wrap("var")`` and ``model.unwrap()`` on every ``PreTrainedModel``."""
    PreTrainedModel.wrap = wrap
    PreTrainedModel.unwrap = unwrap


def _base_name(implementation: str | None) -> str:
    """The attention implementation to fall back on, also when another model that shares the config is wrapped."""
    for base, name in attention.NAMES.items():
        if implementation in (base, name):
            return base
    raise UnsupportedError(
        f"attention implementation '{implementation}' cannot be edited; load the model with attn_implementation='sdpa'"
        " (which runs flash kernels on a GPU) or 'eager'"
    )


def _saved_recipe(model: PreTrainedModel) -> Recipe:
    """The recipe that was saved beside the model, in its folder or on the hub."""
    name = model.name_or_path
    if not name:
        raise InputError(
            f"wrap(model) without a recipe looks for {FILE_NAME} beside the model, and this one is from no folder; give a preset"
        )
    folder = Path(name)
    if not folder.is_dir():
        from transformers.utils import cached_file

        found = cached_file(
            name, FILE_NAME, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        folder = Path(found).parent if found else folder
    if not (folder / FILE_NAME).is_file():
        raise InputError(
            f"wrap(model) without a recipe looks for {FILE_NAME} beside the model, and '{name}' has none; give a preset"
        )
    return Recipe.from_pretrained(folder)


def _generate(self: PreTrainedModel, *args: Any, preset: Any = None, **kwargs: Any) -> Any:
    """``generate`` of a wrapped model; ``preset`` puts another recipe in force for this call only."""
    handle = handle_of(self)
    assert handle is not None
    plan = handle.active_plan if preset is None else handle.plan_of(Recipe.of(preset))
    if not plan.is_identity:
        _refuse_chunks(self, kwargs)
    original = handle._originals.get("generate") or MethodType(type(self).generate, self)
    mask = kwargs.get("attention_mask")
    token = _CALL.set(_Call(handle, plan, _prompt_length(args, kwargs), mask is None or mask.ndim == 2))
    try:
        out = original(*args, **kwargs)
    finally:
        _CALL.reset(token)
    if preset is None and not plan.is_identity:
        handle.warn_if_idle()
    return out


def _refuse_chunks(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    config = kwargs.get("generation_config") or model.generation_config
    if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
        raise UnsupportedError("edits need the prompt in one piece; set prefill_chunk_size=None")


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Slots of the prompt of a generate() call, past turns in the cache included."""
    first = args[0] if args else kwargs.get("inputs")
    for value in (kwargs.get("attention_mask"), kwargs.get("input_ids"), first, kwargs.get("inputs_embeds")):
        if isinstance(value, Tensor) and value.ndim >= 2:
            return value.shape[1]
    return None


def _save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained`` of a wrapped model: what the bare model writes, and the recipe beside it."""
    handle = handle_of(self)
    assert handle is not None
    original = handle._originals.get("save_pretrained") or MethodType(type(self).save_pretrained, self)
    out = original(save_directory, *args, **kwargs)
    handle.recipe.save_pretrained(save_directory)
    return out


# --- hooks. They find the handle on the module they are called with, so that a deep copy of a model uses its own.


def _before_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    handle = handle_of(model)
    if handle is None:
        return args, kwargs
    assert isinstance(model, PreTrainedModel)
    names = list(inspect.signature(type(model).forward).parameters)[1:] if args else []
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    call = _CALL.get()
    if call is None or call.handle is not handle:  # not in generate(), or called from within another model's
        call = _Call(handle, handle.active_plan, None, False)
    step = _make_step(handle, model, call, inputs)
    if step is not None:
        kwargs = {**kwargs, attention.STEP: step}
    return args, kwargs


def _make_step(handle: Handle, model: PreTrainedModel, call: _Call, inputs: dict[str, Any]) -> Step | None:
    """The step of this forward; None when there is nothing to do in it."""
    cache = inputs.get("past_key_values")
    request: Request | None = getattr(cache, _REQUEST, None)
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if tokens is None or (call.plan.is_identity and request is None):
        return None
    decoding = None
    if request is not None and tokens.shape[1] == 1:
        decoding = Step(request, handle._base, None)
        if request.call is call.token:  # one token after another in generate(): nothing here may wait for the device
            return decoding
    start = int(cache.get_seq_length()) if cache is not None else 0
    if start == 0:
        if call.plan.is_identity:
            return None
        request = Request(call.plan)
    elif request is None:
        raise StateError("this cache was filled without vlmattn; start a new generate()")
    _check_request(request, call.plan, tokens.shape[0])
    _check_registration(handle, model)
    if decoding is not None and call.prompt_length is None and start >= request.prompt_length > 0:
        return decoding
    _refuse_packing(inputs)
    request.ledger, request.call = handle._ledger, call.token
    mask = inputs.get("attention_mask")
    if isinstance(mask, dict):  # one per kind of layer
        mask = mask.get("full_attention")
    if start == 0 or call.prompt_length is None or start < call.prompt_length:  # not the draft of assisted decoding
        types = handle._family.types_of_call(model, inputs)
        images = number_images(types, handle._family.image_lengths(model, inputs))
        request.extend(start, types, images, None if mask is None else _real_keys(mask), call.prompt_length)
    if not request.has_images:
        raise InputError(
            "no image tokens in the prompt; put the image placeholder into it (processor.apply_chat_template does), or"
            " call model.vlmattn.disable() for prompts without images"
        )
    if cache is not None:
        setattr(cache, _REQUEST, request)
    return Step(request, handle._base, start, mask is None or mask.ndim == 2 or call.plain_mask)


def _real_keys(mask: Tensor) -> Tensor:
    """bool ``[batch, keys]``: which keys are not padding, from a 2D mask or one that is already 4D (static cache)."""
    if mask.ndim == 2:
        return mask != 0
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.any(dim=(1, 2))


def _refuse_packing(inputs: dict[str, Any]) -> None:
    """Several sequences in one row would be edited as if they were one."""
    if inputs.get("cache") is not None:
        raise UnsupportedError("continuous batching cannot be edited; use generate()")
    positions = inputs.get("position_ids")
    alone = inputs.get("attention_mask") is None and inputs.get("past_key_values") is None
    if alone and isinstance(positions, Tensor) and positions.ndim == 2 and bool((positions.diff(dim=1) != 1).any()):
        raise UnsupportedError(
            "packed sequences (position_ids that start anew) cannot be edited; give them as a padded batch"
        )


def _check_registration(handle: Handle, model: PreTrainedModel) -> None:
    """The decoder must still call us; a deep copy of models that share a config becomes known here."""
    text = model.config.get_text_config()
    if text._attn_implementation != attention.NAMES[handle._base]:
        raise StateError(
            f"the attention implementation was set to '{text._attn_implementation}' while the model was wrapped, by you or"
            " by unwrapping a copy that shares its config; unwrap the model and wrap it again"
        )
    _WRAPPED.setdefault(id(text), weakref.WeakSet()).add(model)


def _check_request(request: Request, plan: Plan, batch: int) -> None:
    """A cache belongs to the recipe and the batch that filled it."""
    if request.batch not in (None, batch):
        raise StateError(
            f"this cache was filled by a batch of {request.batch} and now meets {batch}; start a new generate()"
        )
    if request.plan != plan:
        raise StateError(
            f"this cache was filled with recipe '{request.plan.name}' and cannot go on with '{plan.name}'; start a new generate()"
        )


def _after_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A cache that the forward made itself gets the request, so that the next call finds it."""
    step: Step | None = kwargs.get(attention.STEP)
    cache = getattr(output, "past_key_values", None)
    if step is not None and cache is not None:
        setattr(cache, _REQUEST, step.request)


def _before_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step: Step | None = kwargs.get(attention.STEP)
    if step is None or step.watch is not None or step.start != 0 or not step.request.plan.preparing:
        return
    request, length = step.request, step.request.prompt_length
    embeds = kwargs["inputs_embeds"][:, :length]
    positions = kwargs.get("position_ids")
    types = request.types(length, embeds.device)
    real = request.real(length, embeds.device)

    def run(other: Tensor, real: Tensor, positions: Tensor | None, watch: Any) -> None:
        passing = Step(request, step.base, 0, watch=watch)
        with torch.no_grad():
            decoder(
                inputs_embeds=other,
                attention_mask=real.long(),
                position_ids=positions,
                use_cache=False,
                **{attention.STEP: passing},
            )

    preparation = Preparation(
        request=request,
        layers=len(request.plan.by_layer),
        embeds=embeds,
        real=torch.ones_like(types, dtype=torch.bool) if real is None else real,
        visual=types != 0,
        positions=None if positions is None else positions[..., :length],
        run=run,
    )
    for method in request.plan.preparing:
        method.prepare(preparation)


def _before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step: Step | None = kwargs.get(attention.STEP)
    if step is None or step.watch is not None or not step.is_prompt:
        return
    index = int(layer.self_attn.layer_idx)  # type: ignore[union-attr, arg-type]
    observers = step.request.plan.observing[index]
    if observers:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        start = step.start or 0
        queries = min(hidden.shape[1], step.request.prompt_length - start)  # not what was generated (no cache)
        scope = Scope(step, index, queries, start + queries, hidden.device)
        for method in observers:
            method.observe(scope, hidden[:, :queries])
