"""The hooks of a wrapped model: they make a step of every forward and let the methods see what they need.

They find the handle on the module they are called with, or have it: a deep copy of a model has its own.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn import attention, compat
from vlmattn.errors import InputError, StateError, UnsupportedError
from vlmattn.kernels import additive, visible
from vlmattn.models import Family
from vlmattn.request import (
    IMAGE,
    TEXT,
    VIDEO,
    Image,
    ImageFeatures,
    LayerContext,
    Plan,
    Prefill,
    Request,
    SideStream,
    Step,
    Steps,
)
from vlmattn.wrapping.branch_cache import REQUEST, merged_of
from vlmattn.wrapping.call import CALL, Call
from vlmattn.wrapping.eviction import after_layer, before_layer, check_cache
from vlmattn.wrapping.handle import Handle, handle_of
from vlmattn.wrapping.pruning import check_continuation, check_prompt, pruned_inputs


def install_hooks(handle: Handle, model: PreTrainedModel) -> list[torch.utils.hooks.RemovableHandle]:
    """Put the hooks on a model that has its handle; removing them is up to the caller."""
    family = handle._family
    decoder, entry = family.decoder(model), family.entry(model)
    hooks = [
        entry.register_forward_pre_hook(partial(_before_model, handle), with_kwargs=True),
        entry.register_forward_hook(_after_model, with_kwargs=True, always_call=True),
        decoder.register_forward_pre_hook(partial(_before_decoder, family), with_kwargs=True),
    ]
    if (tower := family.tower(model)) is not None:
        hooks.append(tower.register_forward_pre_hook(_before_tower, with_kwargs=True))
        hooks.append(tower.register_forward_hook(_after_tower))
    for number, module in enumerate(family.tower_attention(model)):
        hooks.append(module.register_forward_pre_hook(partial(_before_tower_attention, number), with_kwargs=True))
    for index, layer in enumerate(family.layers(model)):
        hooks.append(layer.register_forward_pre_hook(partial(_before_layer, index, family), with_kwargs=True))
        hooks.append(layer.register_forward_hook(partial(after_layer, index), with_kwargs=True))
    return hooks


def _before_model(
    handle: Handle, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if handle_of(model) is not handle or attention.STEP in kwargs:
        return args, kwargs
    assert isinstance(model, PreTrainedModel)
    names = list(inspect.signature(type(model).forward).parameters)[1:] if args else []
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    call = CALL.get()
    if call is None or call.handle is not handle or call.direct:  # not in generate(), or within another model's
        stale = call is not None and call.direct and call.model is model  # a forward that raised
        outer = call.outer if call is not None and stale else call
        now = handle.now
        cache = compat.cache_of(inputs)
        call = Call(
            handle,
            model,
            now.acting,
            None,
            False,
            direct=True,
            outer=outer,
            ledger=now.ledger,
            given_cache=cache is not None,
        )
        if call.plan.acts and not torch.compiler.is_compiling() and not handle.enter("forward"):
            return args, kwargs  # unwrapped a moment ago, by another thread
        if call.plan.tower_layers:
            CALL.set(call)
        if call.plan.decoding is not None:
            _refuse_packing(inputs)
            now.warn_of_forward()
    if call.fan is not None and (own := call.fan.begin(model, compat.cache_of(inputs))) is not None:
        kwargs = compat.with_cache(kwargs, own, model)
        inputs = compat.with_cache(inputs, own, model)
        if any(branch.rope != 1 for branch in call.fan.contrast.branches):
            with handle._lock:
                if not handle._rotating:
                    handle._hooks += _hook_rotation(handle._family, model)
                handle._rotating = True
    return args, {**kwargs, attention.STEP: step_of(handle, model, call, inputs)}


def step_of(handle: Handle, model: PreTrainedModel, call: Call | None, inputs: dict[str, Any]) -> Step | Steps | None:
    """What the decoder has to know of this forward; None when there is nothing to do in it."""
    cache = compat.cache_of(inputs)
    if (merged := merged_of(cache)) is not None:
        merged.check(call)
        return merged.steps(cache, inputs["input_ids"].shape[1])
    assert call is not None
    step = _make_step(handle, model, call, inputs)
    early = call.fan.contrast.layers if call.fan is not None and call.fan.cache is not None else ()
    if early or call.blank is not None:
        return Steps(((slice(None), step),), dict.fromkeys(early), blank=call.blank)
    return step


def _make_step(handle: Handle, model: PreTrainedModel, call: Call, inputs: dict[str, Any]) -> Step | None:
    """The step of this forward; None when there is nothing to do in it."""
    cache = compat.cache_of(inputs)
    request: Request | None = getattr(cache, REQUEST, None)
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if request is not None and request.plan is not call.plan and request.plan != call.plan and request.untouched:
        request = None  # a text that no method has changed: as if the bare model had read it
        delattr(cache, REQUEST)
    if tokens is None or (call.plan.is_identity and request is None):
        return None
    decoding = None
    if request is not None and request.batch != len(tokens):
        request = _repeated(request, cache, len(tokens))
    if request is not None and tokens.shape[1] == 1:
        decoding = Step(request, handle._base, None)
        if cache is not None and (request.plan.extending or handle.anatomy.window):
            decoding.at(cache)
        if request.call is call.token:  # one token after another in generate(): nothing here may wait for the device
            return decoding
    start = int(cache.get_seq_length()) if cache is not None else 0
    if start == 0:
        if call.plan.is_identity:
            delattr(cache, REQUEST)  # of a prompt before the cache was reset
            return None
        request = Request(call.plan)
    elif request is None:
        request = _read_before(handle, model, call, start, len(tokens), inputs.get("attention_mask"))
    _check_request(request, call.plan, tokens.shape[0])
    _check_registration(handle)
    if decoding is not None and call.prompt_length is None and start >= request.prompt_length > 0:
        return decoding
    _refuse_packing(inputs)
    if call.plan.drops:
        if inputs.get("labels") is not None:
            raise UnsupportedError(
                f"'{call.plan.name}' drops tokens, so there is no loss over all of them; leave labels out"
            )
        check_continuation(request, start or request.prompt_length)
    request.ledger, request.call = call.ledger, call.token
    mask = inputs.get("attention_mask")
    if isinstance(mask, dict):  # one per kind of layer
        mask = mask.get("full_attention")
    if start == 0 or call.prompt_length is None or start < call.prompt_length:  # not the draft of assisted decoding
        if handle.anatomy.leading:
            types = _leading_types(handle.anatomy.leading, start, inputs)
        else:
            types = handle._family.types_of_call(model, inputs)
        images = handle._family.image_numbers(model, inputs, types, handle.marker_ids)
        real, finder = None if mask is None else _real_keys(mask), handle.turns if call.plan.uses_turns else None
        request.extend(start, types, images, real, call.prompt_length, inputs.get("input_ids"), finder)
        if call.plan.drops:
            check_prompt(request)
    if not request.has_images and not call.plan.texts and not (call.plan.text_first and call.given_cache):
        later = (
            f"; if images follow later, give this prompt a cache to go on from: {compat.cache_name()}=DynamicCache()"
            if call.plan.text_first
            else f"; '{call.plan.name}' cannot go on from their cache: when images follow, give the whole conversation as one prompt"
        )
        raise InputError(
            "no image tokens in the prompt; put the image placeholder into it (processor.apply_chat_template does), or"
            f" call model.vlmattn.disable() for prompts without images{later}"
        )
    if request.plan.policies:
        wanted = inputs.get("use_cache")
        check_cache(
            request.plan,
            cache,
            cache is not None or (model.config.get_text_config().use_cache if wanted is None else wanted),
        )
    if cache is not None:
        setattr(cache, REQUEST, request)
        if request.plan.extending or request.plan.policies:
            _follow_beams(cache)
    if handle.anatomy.window:
        _check_windows(cache, handle.anatomy.window)
    plain = handle.anatomy.causal and (mask is None or mask.ndim == 2 or call.plain_mask)
    return Step(request, handle._base, start, plain, sight=call.sight, order=_image_order(inputs))


def _read_before(
    handle: Handle, model: PreTrainedModel, call: Call, start: int, rows: int, mask: Tensor | None
) -> Request:
    """The request of a cache that was filled without the recipe, where that makes no difference: with text.

    Raises:
        StateError: there is more in it, or nobody knows; the recipe looks at every token as it is read.
    """
    ids, filled = call.ids, "this cache was filled without vlmattn"
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape[1] <= start or handle.anatomy.leading:
        raise StateError(
            f"{filled}, and its tokens are not known; start a new generate() with all of them, and a new cache"
        )
    ids = ids[:, :start].repeat_interleave(rows // len(ids), 0)
    types = handle._family.token_types(model, ids)
    if bool((types != TEXT).any()):
        raise StateError(f"{filled}, with images; start a new generate() with the whole conversation, and a new cache")
    if call.plan.edits_text:
        raise StateError(
            f"{filled}, and '{call.plan.name}' must see every token as it is read; start a new generate() with the whole"
            " conversation, and a new cache"
        )
    request = Request(call.plan)
    real = None if mask is None else _real_keys(mask)[:, :start]
    request.extend(0, types, torch.full_like(types, -1, dtype=torch.int16), real, None, ids)
    return request


def _leading_types(count: int, start: int, inputs: dict[str, Any]) -> Tensor:
    """Types of tokens of which the first ``count`` real ones stand for the image."""
    embeds = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"][..., None]
    mask, types = (
        inputs.get("attention_mask"),
        torch.full(embeds.shape[:2], TEXT, dtype=torch.uint8, device=embeds.device),
    )
    if start == 0:
        real = torch.ones_like(types) if mask is None else mask[:, : types.shape[1]].long()
        types[(real.cumsum(1) <= count) & (real != 0)] = IMAGE
    return types


def _check_windows(cache: Any, window: int) -> None:
    """Which tokens a full ring of slots holds is not known on the host."""
    layers = getattr(cache, "layers", ())
    if any(getattr(layer, "is_sliding", False) and getattr(layer, "max_cache_len", 0) >= window for layer in layers):
        raise UnsupportedError(
            f"a static cache outgrows the sliding window of {window} tokens; use a dynamic cache, or fewer tokens"
        )


def _image_order(inputs: dict[str, Any]) -> list[int] | None:
    """Which encoded image each image of the prompt is: beams get the same tensors again. None = by the rows they are in."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    seen: dict[int, int] = {}
    every = []
    for kind in ("image", "video"):
        found = getattr(encoded.get(kind), "pooler_output", None)
        if isinstance(found, Tensor):  # of equal images: repeated ones are copies
            return None
        every += [] if found is None else list(found)
    for features in every:
        seen.setdefault(features.data_ptr(), len(seen))
    return [seen[features.data_ptr()] for features in every] or None


def _follow_beams(cache: Any) -> None:
    """What is kept about generated tokens changes its row when beam search reorders the cache."""
    cache.reorder_cache = MethodType(_reorder_cache, cache)  # bound, so that a deep copy reorders itself


def _reorder_cache(self: Any, beams: Tensor) -> None:
    type(self).reorder_cache(self, beams)
    getattr(self, REQUEST).reorder(beams)


def _repeated(request: Request, cache: Any, rows: int) -> Request:
    """The request of a cache whose rows were repeated by ``cache.batch_repeat_interleave``."""
    keys = getattr(cache.layers[0], "keys", None) if getattr(cache, "layers", None) else None
    held = len(keys) if isinstance(keys, Tensor) else 0
    if request.batch and held == rows and rows % request.batch == 0:
        request = request.moved(torch.arange(request.batch).repeat_interleave(rows // request.batch))
        setattr(cache, REQUEST, request)
    return request


def _real_keys(mask: Tensor) -> Tensor:
    """bool ``[batch, keys]``: which keys are not padding, from a 2D mask or one that is already 4D (static cache)."""
    if mask.ndim == 2:
        return mask != 0
    return visible(mask).any(dim=(1, 2))


def _refuse_packing(inputs: dict[str, Any]) -> None:
    """Several sequences in one row would be edited as if they were one."""
    if compat.paged(inputs):
        raise UnsupportedError("continuous batching cannot be edited; use generate()")
    positions = inputs.get("position_ids")
    alone = inputs.get("attention_mask") is None and compat.cache_of(inputs) is None
    if alone and isinstance(positions, Tensor) and positions.ndim == 2 and bool((positions.diff(dim=1) != 1).any()):
        raise UnsupportedError(
            "packed sequences (position_ids that start anew) cannot be edited; give them as a padded batch"
        )


def _check_registration(handle: Handle) -> None:
    """The decoder must still call us."""
    found = handle._text._attn_implementation
    if found != attention.NAMES[handle._base]:
        raise StateError(
            f"the attention implementation was set to '{found}' while the model was wrapped, by you or"
            " by unwrapping a copy that shares its config; unwrap the model and wrap it again"
        )


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
    """A cache that the forward made itself gets the request, so that the next call finds it; branches come and go."""
    step: Step | Steps | None = kwargs.get(attention.STEP)
    if not torch.compiler.is_compiling() and (handle := handle_of(model)) is not None:
        handle.leave("forward")
        if (direct := CALL.get()) is not None and direct.direct and direct.model is model:
            CALL.set(direct.outer)
        _tell_missing_weights(handle, output)
    if output is None:  # the forward raised
        return
    if isinstance(step, Steps) and step.merged is not None:
        step.merged.combine(model, compat.cache_of(kwargs), output, step.early)
        return
    if torch.compiler.is_compiling():  # one token of generate(): there is nothing to note
        return
    call, given = CALL.get(), compat.cache_of(kwargs)
    if call is not None and call.fan is not None and call.fan.cache is not None and given is call.fan.cache:
        call.fan.spread(call, kwargs, output, step.early if isinstance(step, Steps) else {})
        return
    first = step.parts[0][1] if step is not None else None
    if first is not None and (cache := compat.output_cache(output)) is not None:
        setattr(cache, REQUEST, first.request)


def _tell_missing_weights(handle: Handle, output: Any) -> None:
    """Put None where a layer has no attention weights, and say so once."""
    if not hasattr(output, "keys"):
        return
    for name in [name for name in output if name.endswith("attentions")]:
        missing = [layer for layer, found in enumerate(output[name] or ()) if found is not None and found.ndim == 1]
        if missing:
            output[name] = tuple(None if found.ndim == 1 else found for found in output[name])
            if handle.now.first("weights"):
                warnings.warn(
                    f"vlmattn: {name} of layers {', '.join(map(str, missing))} are None: their heads keep different tokens"
                    f" under '{handle.recipe.name}'",
                    stacklevel=2,
                )


def _before_decoder(
    family: Family, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    step: Step | Steps | None = kwargs.get(attention.STEP)
    if isinstance(step, Steps):
        if step.blank is not None:
            kwargs = {**kwargs, **_blanked(step.blank, kwargs)}
        step = step.parts[0][1]
    if step is not None and step.request.plan.pruning:
        step.rotary = getattr(decoder, "rotary_emb", None)
    if step is not None and step.watch is None and step.is_prompt:
        plan = step.request.plan
        if plan.on_image_features:
            _show_images(step, step.start or 0, kwargs["inputs_embeds"])
        if plan.before_prefill and step.start == 0 and step.request.has_images:
            _prepare(step, family, decoder, kwargs)
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


def _show_images(step: Step, start: int, embeds: Tensor) -> None:
    """Tell methods what the vision tower saw."""
    request = step.request
    stop = min(start + embeds.shape[1], request.prompt_length)
    types = request.types(stop, embeds.device)[:, start:]
    if not bool((types != TEXT).any()):
        return
    if not step.sight.patches:
        raise InputError(
            f"{', '.join(m.info.name for m in request.plan.on_image_features)} must see the vision tower at work; give pixel_values,"
            " not features that were computed before"
        )
    order = step.order or _order_of_rows(request, start, types, len(next(iter(step.sight.patches.values()))))
    patches = {layer: _ordered(order, seen) for layer, seen in step.sight.patches.items()}
    images = _images(step, order, patches, types, embeds[:, : stop - start]) if request.plan.pruning else ()
    sight = ImageFeatures(request, start, types, patches, images)
    for method in request.plan.on_image_features:
        method.on_image_features(sight)
    if (call := CALL.get()) is not None:
        call.sight.shown = True


def _ordered(order: Sequence[int], seen: Sequence[Any]) -> list[Any]:
    """What was seen of the encoded images, for the images of the prompt."""
    return [seen[i] for i in order]


def _order_of_rows(request: Request, start: int, types: Tensor, encoded: int) -> list[int]:
    """Which of ``on_image_features`` images each image of the prompt is, where every row may be there several times, one after another."""
    numbers = request.images(start + types.shape[1], types.device)[:, start:]
    counts = [
        [torch.unique(row[own]).numel() for row, own in zip(numbers, types == kind, strict=True)]
        for kind in (IMAGE, VIDEO)  # as they are encoded
    ]
    times = sum(map(sum, counts)) // encoded
    order: list[int] = []
    for of_kind in counts:
        for count in of_kind[:: max(times, 1)]:
            first = len(order) // max(times, 1)
            order += [*range(first, first + count)] * times
    return order if len(order) == times * encoded else list(range(encoded))


def _images(
    step: Step, order: Sequence[int], patches: dict[int, list[Tensor]], types: Tensor, embeds: Tensor
) -> tuple[Image, ...]:
    """All that is known of each image of the prompt."""
    call = CALL.get()
    assert call is not None
    keys = {layer: _ordered(order, seen) for layer, seen in step.sight.keys.items()}
    features = _ordered(order, step.sight.features) if step.sight.features else []
    project = partial(call.handle._family.project, call.model)
    if not features:
        lengths = [seen.shape[-1] for seen in next(iter(patches.values()))]
        tokens = torch.cat([embeds[types == kind] for kind in (IMAGE, VIDEO)])
        features = [(image, None) for image in torch.split(tokens, lengths)]
    found = []
    for number, (vectors, summary) in enumerate(features):
        attention_of, keys_of = ({layer: seen[number] for layer, seen in of.items()} for of in (patches, keys))
        found.append(Image(attention_of, keys_of, vectors, summary, project))
    return tuple(found)


def _prepare(step: Step, family: Family, decoder: nn.Module, kwargs: dict[str, Any]) -> None:
    """Let methods have the decoder run on other inputs, before the prompt or beside it."""
    request, length = step.request, step.request.prompt_length
    embeds = kwargs["inputs_embeds"][:, :length]
    positions = kwargs.get("position_ids")
    types = request.types(length, embeds.device)
    real = request.real(length, embeds.device)
    later = {name: kwargs[name] for name in family.also_given if kwargs.get(name) is not None}
    # without a cache there are generated tokens behind the prompt; what is a list has rows for images alone
    later |= {name: value[:, :length] for name, value in later.items() if isinstance(value, Tensor)}

    given = kwargs.get("attention_mask")
    mask = _cut(given, length) if given is not None else torch.ones_like(types, dtype=torch.long)

    def run(other: Tensor, positions: Tensor | None, watch: Any) -> None:
        decoder(**_inputs(Step(request, step.base, 0, watch=watch), other, mask, positions), **later)

    def beside(
        method: Any, other: Tensor, real: Tensor, positions: Tensor | None, layers: frozenset[int], compare: Any
    ) -> None:
        stream = SideStream(method, layers, compare, other)
        passing = Step(request, step.base, 0, watch=stream.watch)
        seen = family.text_mask(real)
        if seen.dtype == torch.bool and step.base == "eager":
            seen = additive(seen, other.dtype)
        stream.hidden, stream.calls = _layer_calls(decoder, _inputs(passing, other, seen, positions))
        step.beside += (stream,)

    prefill = Prefill(
        request=request,
        layers=len(request.plan.by_layer),
        embeds=embeds,
        real=torch.ones_like(types, dtype=torch.bool) if real is None else real,
        visual=types != 0,
        positions=None if positions is None else positions[..., :length],
        run=run,
        beside=beside,
    )
    with torch.no_grad():
        for method in request.plan.before_prefill:
            method.before_prefill(prefill)


def _cut(mask: Any, length: int) -> Any:
    """A mask, or one for each kind of layer, of the first tokens of a prompt."""
    if isinstance(mask, dict):
        return {kind: None if part is None else _cut(part, length) for kind, part in mask.items()}
    return mask[:, :length] if mask.ndim == 2 else mask[..., :length, :length]


def _inputs(step: Step, embeds: Tensor, mask: Any, positions: Tensor | None) -> dict[str, Any]:
    """What the decoder gets to run on ``embeds`` ``[batch, tokens, hidden]`` without a cache."""
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": False,
        attention.STEP: step,
    }


class _Noting(nn.Module):
    """Stands in the place of a decoder layer and notes what the decoder gives it."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        return hidden

    def call(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The layer with all that it was given beside the residual stream."""
        return lambda hidden: layer(hidden, *self.args, **self.kwargs)  # type: ignore[no-any-return]


def _layer_calls(decoder: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, tuple[Callable[[Tensor], Tensor], ...]]:
    """What enters the first layer, and every layer with the masks and rotary tables that the decoder itself makes for it."""
    layers: Any = decoder.layers
    noting = [_Noting() for _ in layers]
    double = copy.copy(decoder)  # shares all weights; the decoder of other threads stays as it is
    double.__dict__["_modules"] = {**decoder._modules, "layers": nn.ModuleList(noting)}
    type(decoder).forward(double, **inputs)
    calls = tuple(noted.call(layer) for layer, noted in zip(layers, noting, strict=True))
    return noting[0].hidden, calls


def _before_layer(
    index: int, family: Family, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    step: Step | Steps | None = kwargs.get(attention.STEP)
    if step is None:
        return None
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    if kwargs.get("output_attentions"):  # some attention modules keep it to themselves
        for _, part in step.parts:
            if part is not None:
                part.wants_weights = True
    if isinstance(step, Steps) and index in step.early:
        step.early[index] = family.residual(hidden)
    first = step.parts[0][1]
    if first is not None and first.request.plan.drops and first.watch is None:  # never with branches
        view, hidden, kwargs = pruned_inputs(first, layer, index, hidden, kwargs)
        before_layer(view, index, hidden.shape[1], compat.cache_of(kwargs))
        _observe(view, index, hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
    for rows, part in step.parts:
        if part is not None and part.watch is None:
            _observe(part, index, family.residual(hidden)[rows])
    return None


def _observe(step: Step, index: int, hidden: Tensor) -> None:
    plan = step.request.plan
    for watcher in plan.watching:
        watcher.enter(step, index, hidden)
    observers = plan.on_hidden_states[index]
    if len(observers) == 0 or not (
        step.is_prompt or index in plan.extending
    ):  # a tuple in "not" breaks compiled graphs
        return
    if step.start is None:  # one generated token
        context = LayerContext(step, index, 1, step.capacity, hidden.device)
    else:
        extended = index in plan.extending
        queries = hidden.shape[1] if extended else min(hidden.shape[1], step.request.prompt_length - step.start)
        context = LayerContext(step, index, queries, step.start + queries, hidden.device)
    for method in observers:
        if step.is_prompt or method.follows_hidden_states:
            method.on_hidden_states(context, hidden[:, : context.queries])


def _before_tower(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = CALL.get()
    if call is not None and call.plan.tower_layers and call.handle._family.tower(call.model) is tower:
        names = list(inspect.signature(type(tower).forward).parameters)[1:] if args else []
        if call.sight.shown:
            for seen in (call.sight.patches, call.sight.keys, call.sight.features):
                seen.clear()
            call.sight.shown = False
        call.sight.inputs = {**dict(zip(names, args, strict=False)), **kwargs}


def _after_tower(tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    call = CALL.get()
    if (
        call is not None
        and call.plan.tower_layers
        and call.plan.pruning
        and call.handle._family.tower(call.model) is tower
    ):
        call.sight.features += call.handle._family.patch_features(call.model, output)


def _before_tower_attention(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = CALL.get()
    if call is None or number not in call.plan.tower_layers:
        return
    if call.handle._family.tower_attention(call.model)[number] is not module:  # another model, in or after this call
        return
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    with torch.no_grad():
        inputs = (call.model, module, hidden, call.sight.inputs)
        call.sight.patches.setdefault(number, []).extend(call.handle._family.summary_attention(*inputs))
        if call.plan.pruning:
            call.sight.keys.setdefault(number, []).extend(call.handle._family.patch_keys(*inputs))


def _hook_rotation(family: Family, model: PreTrainedModel) -> list[torch.utils.hooks.RemovableHandle]:
    """A hook that lets row groups have rotary bases of their own; only models whose recipe asks for it get it."""
    return [family.rotary(model).register_forward_hook(_rotate_apart, with_kwargs=True)]


def _rotate_apart(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...] | None:
    call = CALL.get()
    if call is None or call.handle._family.rotary(call.model) is not module:
        return None
    ropes = (call.rope,) if call.fan is None else call.fan.ropes
    if all(rope == 1 for rope in ropes):
        return None
    hidden, positions = (*args, *kwargs.values())[:2]
    groups = zip(ropes, positions.chunk(len(ropes), -2), *(table.chunk(len(ropes), -3) for table in out), strict=True)
    tables = [
        found if rope == 1 else call.handle.rotary(module, rope).forward(hidden, part) for rope, part, *found in groups
    ]
    return tuple(torch.cat(parts, -3) for parts in zip(*tables, strict=True))
