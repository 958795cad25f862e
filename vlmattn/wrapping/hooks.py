"""The hooks of a wrapped model: they make a ``Forward`` of every forward and let the methods see what they need.

They find the record on the module they are called with, or have it: a deep copy of a model has its own.
"""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.attention import FORWARD
from vlmattn.models import Family
from vlmattn.request import NO_PLAN, Forward, ImageContext, LayerContext, Part, Step
from vlmattn.wrapping.call import CALL, Call
from vlmattn.wrapping.eviction import after_layer, before_layer
from vlmattn.wrapping.handle import record_of
from vlmattn.wrapping.on_cache import ride
from vlmattn.wrapping.prefill import prepare
from vlmattn.wrapping.pruning import pruned_inputs
from vlmattn.wrapping.record import Record
from vlmattn.wrapping.registration import refuse_mask
from vlmattn.wrapping.rotation import hook_rotation
from vlmattn.wrapping.steering import enter_layer, hook_mlp, leave_model, steer_layer
from vlmattn.wrapping.steps import forward_of, refuse_packing, with_forward
from vlmattn.wrapping.vision import hook_tower, show_images

Args = tuple[tuple[Any, ...], dict[str, Any]]


def install_hooks(record: Record, model: PreTrainedModel) -> list[torch.utils.hooks.RemovableHandle]:
    """Put the hooks on a model that has its record; removing them is up to the caller."""
    family = record.family
    decoder, entry = family.decoder(model), family.entry(model)
    hooks = [
        entry.register_forward_pre_hook(partial(_before_model, record), with_kwargs=True),
        entry.register_forward_hook(_after_model, with_kwargs=True, always_call=True),
        decoder.register_forward_pre_hook(partial(_before_decoder, family), with_kwargs=True),
        *hook_tower(family, model),
    ]
    for index, layer in enumerate(family.layers(model)):
        hooks.append(layer.register_forward_pre_hook(partial(_before_layer, index, family), with_kwargs=True))
        hooks.append(layer.register_forward_hook(partial(after_layer, index), with_kwargs=True))
        hooks.append(layer.register_forward_hook(partial(steer_layer, index), with_kwargs=True))
        hooks += hook_mlp(layer)
    return hooks


def _before_model(record: Record, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Args:
    if record_of(model) is not record or FORWARD in kwargs:
        return args, kwargs
    assert isinstance(model, PreTrainedModel)
    names = list(inspect.signature(type(model).forward).parameters)[1:] if args else []
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    call = CALL.get()
    if call is None or call.record is not record or call.direct:  # not in generate(), or within another model's
        call = _direct_call(record, model, inputs, call)
        refuse_mask(record.base, inputs.get("attention_mask"))
        if call.plan.acts and not torch.compiler.is_compiling() and not record.enter("forward"):
            return args, kwargs  # unwrapped a moment ago, by another thread
        _begin(call, inputs)
    if call.branches is not None and (own := call.branches.begin(model, compat.cache_of(inputs))) is not None:
        kwargs = compat.with_cache(kwargs, own, model)
        inputs = compat.with_cache(inputs, own, model)
        hook_rotation(record, model, call)
    return args, with_forward(kwargs, forward_of(record, model, call, inputs), record.family, inputs)


def _direct_call(record: Record, model: PreTrainedModel, inputs: dict[str, Any], outer: Call | None) -> Call:
    """The call that a forward outside of generate() is."""
    if outer is not None and outer.direct and outer.model is model:  # a forward that raised
        outer = outer.outer
    now, given = record.now, compat.cache_of(inputs) is not None
    return Call(
        record, model, now.acting, None, False, direct=True, outer=outer, ledger=now.ledger, given_cache=given
    )  # fmt: skip


def _begin(call: Call, inputs: dict[str, Any]) -> None:
    """Note a forward outside of generate(), where the vision tower is looked at, and say what does not act in it."""
    if call.plan.tower_layers:
        CALL.set(call)
    if call.plan.decoding is not None:
        refuse_packing(inputs)
        call.record.now.warn_of_forward()


def _after_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A cache that the forward made itself gets the request, so that the next call finds it; branches come and go."""
    passing: Forward | None = kwargs.get(FORWARD)
    if not torch.compiler.is_compiling():
        _end(model, output)
    if output is None:  # the forward raised
        return
    if passing is not None and passing.branches is not None:
        passing.branches.combine(model, compat.cache_of(kwargs), output, passing.early)
        return
    if torch.compiler.is_compiling():  # one token of generate(): there is nothing to note
        return
    call, given = CALL.get(), compat.cache_of(kwargs)
    if call is not None and call.branches is not None and given is not None and given is call.branches.cache:
        call.branches.spread(call, kwargs, output, {} if passing is None else passing.early)
        return
    if passing is not None and (cache := compat.output_cache(output)) is not None:
        _let_ride(passing.main, cache)


def _let_ride(main: Part, cache: Any) -> None:
    """Put what was read on the cache that has it."""
    if main.noted is not None:
        ride(cache, main.noted, NO_PLAN)
    elif main.step is not None:
        ride(cache, main.step.request, main.plan)


def _end(model: nn.Module, output: Any) -> None:
    """Note that a forward is over, also one that raised."""
    leave_model()
    if (direct := CALL.get()) is not None and direct.direct and direct.model is model:
        CALL.set(direct.outer)
    if (record := record_of(model)) is None:
        return
    record.leave("forward")
    _tell_missing_weights(record, output)


def _tell_missing_weights(record: Record, output: Any) -> None:
    """Put None where a layer has no attention weights, and say so once."""
    if not hasattr(output, "keys"):
        return
    for name in [name for name in output if name.endswith("attentions") and isinstance(output[name], tuple)]:
        missing = [layer for layer, found in enumerate(output[name]) if found is not None and found.ndim == 1]
        if missing:
            output[name] = tuple(None if found.ndim == 1 else found for found in output[name])
            if record.now.first("weights"):
                warnings.warn(
                    f"vlmattn: {name} of layers {', '.join(map(str, missing))} are None: their heads keep different"
                    f" tokens under '{record.now.recipe.name}'",
                    stacklevel=2,
                )


def _before_decoder(family: Family, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Args:
    passing: Forward | None = kwargs.get(FORWARD)
    if passing is None:
        return args, kwargs
    kwargs = family.embedded(decoder, kwargs)
    if passing.blank is not None:
        kwargs = {**kwargs, **_blanked(passing.blank, kwargs)}
    main, step = passing.main, passing.main.step
    if step is not None and main.plan.pruning:
        step.rotary = compat.rotary_tables(decoder)
    if main.acting is not None and main.acting.is_prompt:
        if main.plan.on_image_features:
            show_images(main.acting, main.plan, kwargs["inputs_embeds"])
        if main.plan.before_prefill and main.acting.start == 0 and main.acting.request.has_images:
            prepare(main, family, decoder, kwargs)
    return args, kwargs


def _blanked(blank: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The decoder's features of the images with zeros for some tokens, those that DeepStack adds later too."""
    embeds = kwargs["inputs_embeds"]
    blank = blank.to(embeds.device)
    found = {"inputs_embeds": embeds.masked_fill(blank[..., None], 0)}
    if (later := kwargs.get("deepstack_visual_embeds")) is not None:
        gone = blank[kwargs["visual_pos_masks"].to(blank.device)][:, None]
        found["deepstack_visual_embeds"] = [features.masked_fill(gone.to(features.device), 0) for features in later]
    return found


def _before_layer(
    index: int, family: Family, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Args | None:
    changed = _inputs_of_layer(index, family, layer, args, kwargs)
    args, kwargs = (args, kwargs) if changed is None else changed
    enter_layer(index, kwargs.get(FORWARD), args[0] if args else kwargs["hidden_states"])
    return changed


def _inputs_of_layer(
    index: int, family: Family, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Args | None:
    """Let methods see what enters a layer; other inputs where tokens were dropped."""
    passing: Forward | None = kwargs.get(FORWARD)
    if passing is None:
        return None
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    if kwargs.get("output_attentions"):  # some attention modules keep it to themselves
        _ask_for_weights(passing)
    if index in passing.early:
        passing.early[index] = family.residual(hidden)
    if passing.branches is not None and passing.branches.drops:
        return args[:1], passing.branches.inputs_of(index, hidden, {**kwargs, **_named(layer, args)})
    main = passing.main
    if main.acting is not None and main.plan.drops:
        kwargs = {**kwargs, **_named(layer, args)}
        view, hidden, kwargs = pruned_inputs(passing, layer, family.attention(layer) is not None, index, hidden, kwargs)
        before_layer(view, index, hidden.shape[1], compat.cache_of(kwargs))
        _tell_hidden_states(main, view, index, hidden)
        return ((hidden,), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
    for part in passing.parts:
        if part.acting is not None:
            _tell_hidden_states(part, part.acting, index, family.residual(hidden)[part.rows])
            if index in part.plan.cross and (states := family.image_states(kwargs, len(hidden))) is not None:
                _tell_images(part, part.acting, index, states[part.rows])
    return None


def _ask_for_weights(passing: Forward) -> None:
    for part in passing.parts:
        if part.step is not None:
            part.step.wants_weights = True


def _named(layer: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """What a layer is given by place behind the residual stream, by name."""
    names = list(inspect.signature(type(layer).forward).parameters)[2:] if len(args) > 1 else ()
    return dict(zip(names, args[1:], strict=False))


def _tell_hidden_states(part: Part, step: Step, index: int, hidden: Tensor) -> None:
    """Let watchers and methods see the residual stream that enters a layer."""
    plan = part.plan
    for watcher in plan.watching:
        watcher.enter(step, index, hidden)
    methods, extended = () if index in plan.cross else plan.on_hidden_states[index], index in plan.extending
    if len(methods) == 0 or not (step.is_prompt or extended):  # a tuple in "not" breaks compiled graphs
        return
    if step.start is None:  # one generated token
        context = LayerContext(step, index, 1, step.capacity, hidden.device)
    else:
        queries = hidden.shape[1] if extended else min(hidden.shape[1], step.request.prompt_length - step.start)
        context = LayerContext(step, index, queries, step.start + queries, hidden.device)
    for method in methods:
        if step.is_prompt or method.follows_hidden_states:
            method.on_hidden_states(context, hidden[:, : context.queries])


def _tell_images(part: Part, step: Step, index: int, states: Tensor) -> None:
    """Let methods see the states ``[batch, keys, width]`` of which a layer of cross-attention makes keys."""
    keys = states.shape[1]
    context = ImageContext(step, index, keys, keys, states.device, each=part.plan.image_keys)
    for method in part.plan.on_hidden_states[index]:
        method.on_hidden_states(context, states)
