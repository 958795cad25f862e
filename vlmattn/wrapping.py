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
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn import attention
from vlmattn.errors import InputError, OptionError, StateError, UnsupportedError
from vlmattn.interventions.files import beside, copy_whole
from vlmattn.models import Anatomy, Family, Turns, find_family
from vlmattn.recipe import FILE_NAME, Recipe
from vlmattn.request import TEXT, Ledger, Plan, Preparation, Request, Scope, Sight, Slots, Step, number_images

_M = TypeVar("_M", bound=nn.Module)
_REQUEST = "_vlmattn_request"  # where a request rides on its cache
_INSTANCE_METHODS = ("generate", "save_pretrained")


@dataclass(frozen=True)
class _Call:
    """One generate() call in progress: its recipe, the length of its prompt, and whether its mask is only padding.

    ``token`` is what a request remembers of it (never the handle or the model). ``direct`` marks a forward outside of
    generate(), which is only noted while the vision tower is looked at; ``outer`` is the call it may lie in.
    """

    handle: Handle
    model: PreTrainedModel
    plan: Plan
    prompt_length: int | None
    plain_mask: bool
    direct: bool = False
    outer: _Call | None = None
    token: object = field(default_factory=object)
    sight: _TowerView = field(default_factory=lambda: _TowerView())


@dataclass
class _TowerView:
    """What was seen of the vision tower in one call: layer -> for each image ``[heads, tokens]``."""

    patches: dict[int, list[Tensor]] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)


# Which generate() call of which model runs in this thread. Only the model's pre-hook reads it, to hand the plan and the
# prompt length to the request; without a cache (use_cache=False) every forward makes a request of its own from it.
_CALL: ContextVar[_Call | None] = ContextVar("vlmattn_call", default=None)

# The step whose attention module runs in this thread: projections get no keyword arguments.
_STEP: ContextVar[Step | None] = ContextVar("vlmattn_step", default=None)

# Wrapped models by text config: two models may share one config object, and the last one out restores its setting.
_WRAPPED: dict[int, weakref.WeakSet[nn.Module]] = {}


class Handle:
    """``model.vlmattn``: what is on the model, and what it did.

    Attributes:
        recipe: the recipe in force.
        anatomy: sizes of the decoder.
        turns: the chat template's markers, for recipes that need them.
    """

    def __init__(self, recipe: Recipe, anatomy: Anatomy, family: Family, base: str, processor: Any = None) -> None:
        self.anatomy, self._family, self._base = anatomy, family, base
        self._processor = processor
        self.turns: Turns | None = None
        self._enabled, self._projecting = True, False
        self._plans: dict[Recipe, Plan] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._originals: dict[str, Any] = {}
        self.set(recipe)

    def set(self, recipe: Any, **options: Any) -> None:
        """Put another recipe in force, from the next prompt on; ``report()`` starts anew."""
        chosen = Recipe.of(recipe, **options)
        self._plan, self.recipe = self.plan_of(chosen), chosen
        self._ledger, self._warned = Ledger(), False

    @contextmanager
    def lent(self, recipe: Any) -> Iterator[None]:
        """Another recipe in force for the block; after it recipe, report and state are as before."""
        before = (self.recipe, self._plan, self._ledger, self._warned, self._enabled)
        self.set(recipe)
        lent, self._enabled = self.recipe, True
        try:
            yield
        finally:
            self._plans.pop(lent, None)  # what measures keeps what it has seen
            self.recipe, self._plan, self._ledger, self._warned, self._enabled = before

    def plan_of(self, recipe: Recipe) -> Plan:
        if recipe not in self._plans:
            plan = recipe.bind(self.anatomy)
            if plan.uses_turns and self.turns is None:
                self.turns = _turns(self._processor, self.anatomy.source, plan.turns)
            self._plans[recipe] = plan
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
            ``recipe``; ``fired``: how often each method found something to do (each method's docstring says what it
            counts); ``backends``: phase -> backend -> number of attention calls; ``layers``: phase -> backend
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


def wrap(model: _M, recipe: Any = None, *, processor: Any = None, **options: Any) -> _M:
    """Put a recipe on a model, in place, and return the model.

    Args:
        model: a supported ``PreTrainedModel`` (``vlmattn.supported_families()``), with sdpa or eager attention.
        recipe: a preset (``"var"``), presets joined by ``+``, a recipe file, a method, or a list of methods. None
            looks for the recipe that was saved beside the model.
        processor: the model's processor or tokenizer, for methods that must know where the user's turn ends (``mma``,
            ``gift``, ...); None looks for it in the folder that the model came from, when a method needs it.
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
    handle = Handle(
        chosen, family.anatomy(model), family, base, processor
    )  # every check of the recipe is before the first change
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
        family.tower(model).register_forward_pre_hook(_before_tower, with_kwargs=True),
    ]
    for number, module in enumerate(family.tower_attention(model)):
        hooks.append(module.register_forward_pre_hook(partial(_before_tower_attention, number), with_kwargs=True))
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
def applied(model: _M, recipe: Any, *, processor: Any = None, **options: Any) -> Iterator[_M]:
    """``with applied(model, "var"): ...`` wraps for the block and unwraps after it, also when it raises."""
    wrap(model, recipe, processor=processor, **options)
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


def _turns(processor: Any, source: str, needed_by: tuple[str, ...]) -> Turns | None:
    """Markers from the processor that was given, else from the one in the folder that the model came from.

    Without either None, or an error if a method needs them.
    """
    if processor is not None:
        return Turns.of(processor)
    from transformers import AutoProcessor

    names = ", ".join(needed_by)
    try:
        return Turns.of(AutoProcessor.from_pretrained(source, local_files_only=True))
    except Exception as error:  # no folder, no processor in it, one that cannot be read: the remedy is the same
        if not needed_by:
            return None
        raise OptionError(
            f"{names} must know where the user's turn ends; give the processor: wrap(model, ..., processor=processor)"
        ) from error


def _saved_recipe(model: PreTrainedModel) -> Recipe:
    """The recipe that was saved beside the model, in its folder or on the hub."""
    name = model.name_or_path
    if not name:
        raise InputError(
            f"wrap(model) without a recipe looks for {FILE_NAME} beside the model, and this one is from no folder; give a preset"
        )
    found = beside(name, FILE_NAME)
    if found is None:
        raise InputError(
            f"wrap(model) without a recipe looks for {FILE_NAME} beside the model, and '{name}' has none; give a preset"
        )
    return Recipe.from_pretrained(found.parent)


def _generate(self: PreTrainedModel, *args: Any, preset: Any = None, **kwargs: Any) -> Any:
    """``generate`` of a wrapped model; ``preset`` puts another recipe in force for this call only."""
    handle = handle_of(self)
    assert handle is not None
    plan = handle.active_plan if preset is None else handle.plan_of(Recipe.of(preset))
    if not plan.is_identity:
        _refuse_chunks(self, kwargs)
    original = handle._originals.get("generate") or MethodType(type(self).generate, self)
    mask = kwargs.get("attention_mask")
    token = _CALL.set(_Call(handle, self, plan, _prompt_length(args, kwargs), mask is None or mask.ndim == 2))
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
    for method in {method for methods in handle._plan.by_layer for method in methods}:
        for key, name in getattr(method, "files", {}).items():  # what was found beside this model goes with it
            if getattr(method, key):
                copy_whole(getattr(method, key), Path(save_directory) / name)
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
    if call is None or call.handle is not handle or call.direct:  # not in generate(), or within another model's
        stale = call is not None and call.direct and call.model is model  # a forward that raised
        outer = call.outer if call is not None and stale else call
        call = _Call(handle, model, handle.active_plan, None, False, direct=True, outer=outer)
        if call.plan.tower_layers:
            _CALL.set(call)
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
        if cache is not None and request.plan.extending:
            decoding.slot, decoding.capacity = cache.get_seq_length(), cache.get_max_cache_shape()
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
        real, finder = None if mask is None else _real_keys(mask), handle.turns if call.plan.uses_turns else None
        request.extend(start, types, images, real, call.prompt_length, inputs.get("input_ids"), finder)
    if not request.has_images and not call.plan.texts:
        raise InputError(
            "no image tokens in the prompt; put the image placeholder into it (processor.apply_chat_template does), or"
            " call model.vlmattn.disable() for prompts without images"
        )
    if request.plan.directions and not handle._projecting:
        handle._projecting = True
        handle._hooks += _hook_projections(handle._family, model)
    if cache is not None:
        setattr(cache, _REQUEST, request)
        if request.plan.extending:
            _follow_beams(cache, request)
    plain = mask is None or mask.ndim == 2 or call.plain_mask
    return Step(request, handle._base, start, plain, sight=call.sight.patches, order=_image_order(inputs))


def _image_order(inputs: dict[str, Any]) -> list[int] | None:
    """Which encoded image each image of the prompt is: beams get the same tensors again. None = one after another."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    seen: dict[int, int] = {}
    for kind in ("image", "video"):
        if kind in encoded:
            for features in encoded[kind].pooler_output:
                seen.setdefault(features.data_ptr(), len(seen))
    every = [f for kind in ("image", "video") if kind in encoded for f in encoded[kind].pooler_output]
    return [seen[features.data_ptr()] for features in every] or None


def _follow_beams(cache: Any, request: Request) -> None:
    """What is kept about generated tokens changes its row when beam search reorders the cache."""
    if "reorder_cache" in cache.__dict__:
        return
    original = cache.reorder_cache

    def reorder_cache(beams: Tensor) -> None:
        original(beams)
        for kept in request.state.values():
            if isinstance(kept, Slots):
                kept.reorder(beams)

    cache.reorder_cache = reorder_cache


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
    call = _CALL.get()
    if call is not None and call.direct and call.model is model:
        _CALL.set(call.outer)
    cache = getattr(output, "past_key_values", None)
    if step is not None and cache is not None:
        setattr(cache, _REQUEST, step.request)


def _before_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step: Step | None = kwargs.get(attention.STEP)
    if step is None or step.watch is not None or not step.is_prompt:
        return
    plan = step.request.plan
    if plan.seeing:
        _show_images(step, step.start or 0, kwargs["inputs_embeds"])
    if plan.preparing and step.start == 0:
        _prepare(step, decoder, kwargs)


def _show_images(step: Step, start: int, embeds: Tensor) -> None:
    """Tell methods what the vision tower saw."""
    request = step.request
    stop = min(start + embeds.shape[1], request.prompt_length)
    types = request.types(stop, embeds.device)[:, start:]
    if not bool((types != TEXT).any()):
        return
    patches = {layer: [seen[i] for i in step.order or range(len(seen))] for layer, seen in step.sight.items()}
    if not patches:
        raise InputError(
            f"{', '.join(m.info.name for m in request.plan.seeing)} must see the vision tower at work; give pixel_values,"  # type: ignore[attr-defined]
            " not features that were computed before"
        )
    sight = Sight(request, start, types, patches)
    for method in request.plan.seeing:
        method.encoded(sight)


def _prepare(step: Step, decoder: nn.Module, kwargs: dict[str, Any]) -> None:
    """Let methods run the decoder on other inputs."""
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
    if step is None or step.watch is not None:
        return
    index = int(layer.self_attn.layer_idx)  # type: ignore[union-attr, arg-type]
    plan = step.request.plan
    observers = plan.observing[index]
    if not observers or not (step.is_prompt or index in plan.extending):
        return
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    if step.start is None:  # one generated token
        scope = Scope(step, index, 1, step.capacity, hidden.device)
    else:
        extended = index in plan.extending
        queries = hidden.shape[1] if extended else min(hidden.shape[1], step.request.prompt_length - step.start)
        scope = Scope(step, index, queries, step.start + queries, hidden.device)
    for method in observers:
        if step.is_prompt or method.observes_generated:
            method.observe(scope, hidden[:, : scope.queries])


def _before_tower(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = _CALL.get()
    if call is not None and call.plan.tower_layers and call.handle._family.tower(call.model) is tower:
        names = list(inspect.signature(type(tower).forward).parameters)[1:] if args else []
        call.sight.inputs = {**dict(zip(names, args, strict=False)), **kwargs}


def _before_tower_attention(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = _CALL.get()
    if call is None or number not in call.plan.tower_layers:
        return
    if call.handle._family.tower_attention(call.model)[number] is not module:  # another model, in or after this call
        return
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    with torch.no_grad():
        seen = call.handle._family.summary_attention(call.model, module, hidden, call.sight.inputs)
    call.sight.patches.setdefault(number, []).extend(seen)


def _hook_projections(family: Family, model: PreTrainedModel) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that add directions to queries and keys; only models whose recipe has some get them."""
    hooks = []
    for index, layer in enumerate(family.layers(model)):
        module, query, key = family.projections(layer)
        hooks += [
            module.register_forward_pre_hook(_before_attention, with_kwargs=True),
            query.register_forward_hook(partial(_add_direction, index, "query")),
            key.register_forward_hook(partial(_add_direction, index, "key")),
        ]
    return hooks


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _STEP.set(kwargs.get(attention.STEP))


def _add_direction(index: int, side: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
    step = _STEP.get()
    if step is None or step.watch is not None:
        return None
    for layer, found in step.request.plan.directions:
        added = getattr(found, side)
        if layer == index and added is not None:
            key = ("direction", layer, side, out.device, out.dtype)
            out = out + step.request.state.setdefault(key, added.flatten().to(out))
    return out
