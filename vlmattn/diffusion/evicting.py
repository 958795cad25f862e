"""Image slots that a DiffusionGemma model lets go between reading the prompt and denoising."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlmattn import compat
from vlmattn.compat import DynamicLayer, DynamicSlidingWindowLayer
from vlmattn.diffusion.gaze import gaze, rotated
from vlmattn.diffusion.schedules import Constant, Schedule, counts_of, share_of
from vlmattn.errors import InputError, OptionError, StateError, UnsupportedError, quoted
from vlmattn.kernels import additive, visible
from vlmattn.request import NO_PLAN, Request, TokenMap, compacted
from vlmattn.wrapping.cache_layers import picked
from vlmattn.wrapping.on_cache import report_original_lengths, request_on, ride

_PROMPT = "_vlmattn_prompt"  # where a prompt rides on the arguments of the encoder's layers
_STATE = "evicted"  # where a ``_State`` lies in a request


@dataclass
class Evicted:
    """What ``evicted`` does, as it goes; layers are those with full attention.

    Attributes:
        slots: for each prompt with images the cached slots of each layer after it was read.
        read: for each denoising step the slots of the prompt and of finished canvases that each layer read.
        bytes: for each prompt bytes of these layers' keys and values, before and after.
    """

    slots: list[list[int]] = field(default_factory=list)
    read: list[list[int]] = field(default_factory=list)
    bytes: list[tuple[int, int]] = field(default_factory=list)


@contextmanager
def evicted(
    model: Any, keep_ratio: float | Schedule = 0.5, *, steps: int | None = None, mode: str = "drop"
) -> Iterator[Evicted]:
    """Let a DiffusionGemma model keep part of the image tokens between reading the prompt and denoising, for the block.

    Its encoder writes keys and values once; every denoising step of every canvas reads them. With n image tokens in a
    sequence and a_j the attention that the last prompt row pays to slot j in a full-attention layer, mean over heads:

        held:           the round(max_s keep(s, l) n) image tokens with the highest a stay in layer l
        read in step s: the round(keep(s, l) n) highest of them

    Text and finished canvases stay, and positions as they were. Sliding layers are left alone: a window counts slots.

    Args:
        keep_ratio: the share that stays, or a ``Schedule`` of it (steps count anew for each canvas).
        steps: denoising steps of a canvas, ``max_denoising_steps``; a schedule needs it.
        mode: "mask" hides what "drop" evicts or does not read: the same choice, to compare with.

    A cache that was made in the block is of use within it only.

    Raises:
        OptionError: a ratio out of 0..1, no such mode, no steps for a schedule, a schedule about sliding layers only.
        InputError: a prompt as embeddings, or padded on the right.
        StateError: more denoising steps than ``steps``, one block within another.
        UnsupportedError: another model, flash or flex attention, a static, quantised or offloaded cache, images in a
            later turn.
    """
    if mode not in ("drop", "mask"):
        raise OptionError(f"mode must be drop or mask, got {quoted(mode)}")
    if getattr(getattr(model, "config", None), "model_type", None) != "diffusion_gemma":
        raise UnsupportedError(
            f"evicted() knows diffusion_gemma models only, not {type(model).__name__}; see thinned()"
        )
    eviction = _Eviction(model, keep_ratio, steps, mode == "drop")
    hooks: list[Any] = []
    try:
        eviction.hook(model.model, hooks)
        yield eviction.report
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(eq=False)
class _Prompt:
    """A prompt that the encoder reads.

    Attributes:
        visual, real: bool ``[batch, prompt]``, image tokens and what is no padding.
        padded: there is padding.
        given, text: image tokens and other real ones of each sequence.
        slots, bytes: see ``Evicted``.
    """

    visual: Tensor
    real: Tensor
    padded: bool
    given: list[int]
    text: list[int]
    slots: list[int] = field(default_factory=list)
    bytes: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class _Held:
    """What a layer holds of a prompt.

    Attributes:
        rank: int64 ``[batch, held]``, place of each image token among those of its sequence by worth; -1 for others.
        valid: bool ``[batch, held]``, False for padding and fillers; None = all True.
        counts: image tokens of each sequence that it holds.
        view: the last view of the cache that a step needed: for which (slots, counts), what it reads, and their map.
    """

    rank: Tensor
    valid: Tensor | None
    counts: tuple[int, ...]
    view: tuple[Any, Any, TokenMap] | None = None


@dataclass(eq=False)
class _State:
    """What a cache knows of its prompt: ``step`` of the present canvas, and what each layer holds."""

    prompt: _Prompt
    step: int = -1
    layers: dict[int, _Held] = field(default_factory=dict)


def _state(cache: Any) -> _State | None:
    request = request_on(cache)
    return request.store(_STATE).shared.get(_STATE) if request is not None else None


def _request(cache: Any) -> Request:
    request = request_on(cache)
    assert request is not None
    return request


class _Eviction:
    """The hooks of ``evicted``. They keep nothing about a prompt: that rides on its cache."""

    def __init__(self, model: Any, keep_ratio: float | Schedule, steps: int | None, drop: bool) -> None:
        self.text, self.image, self.drop = model.config.get_text_config(), model.config.image_token_id, drop
        self.layers: int = self.text.num_hidden_layers
        self.report = Evicted()
        if steps is not None and steps < 1:
            raise OptionError(f"steps must count the denoising steps of a canvas, got {steps}")
        if isinstance(keep_ratio, (int, float)):
            keep_ratio = Constant(keep_ratio)
        elif steps is None:
            raise OptionError("a schedule needs steps=..., the denoising steps of a canvas (max_denoising_steps)")
        self.schedule, self.steps = keep_ratio, steps
        kinds = self.text.layer_types
        self.full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        self.most = {index: max(self.shares(index)) for index in range(self.layers)}
        acts = [index for index in range(self.layers) if min(self.shares(index)) < 1]
        if acts and not set(acts) & set(self.full):
            raise OptionError(
                f"{quoted(keep_ratio)} is about sliding layers only, which keep all their slots; layers with full"
                f" attention: {self.full}"
            )

    def shares(self, index: int) -> list[float]:
        """What the schedule says for a layer, step by step."""
        steps = self.steps or 1
        return [share_of(self.schedule, step, steps, index, self.layers) for step in range(steps)]

    def hook(self, model: Any, hooks: list[Any]) -> None:
        """Register all hooks on a ``DiffusionGemmaModel``."""
        hooks.append(model.encoder.register_forward_pre_hook(self.before_encoder, with_kwargs=True))
        hooks.append(model.encoder.register_forward_hook(self.after_encoder, with_kwargs=True))
        hooks.append(model.decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True))
        for index in self.full:
            encoder, decoder = model.encoder.language_model.layers[index], model.decoder.layers[index]
            after = partial(self.after_attention, index)
            hooks.append(encoder.self_attn.register_forward_hook(after, with_kwargs=True))
            for layer, reads in ((encoder, False), (decoder, True)):
                before = partial(self.before_layer, index, reads)
                hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))

    def before_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache, ids = compat.cache_of(kwargs), args[0] if args else kwargs.get("input_ids")
        if cache is not None and int(cache.get_seq_length()):
            if kwargs.get("pixel_values") is not None:
                raise UnsupportedError("evicted() knows images in the first turn only; begin without past_key_values")
            if (state := _state(cache)) is not None:
                state.step = -1
            return None
        if _PROMPT in kwargs:
            raise StateError("one evicted() block lies in another on the same model; leave the outer one first")
        if ids is None:
            raise InputError("evicted() finds image tokens by input_ids, and the prompt came as embeddings")
        self.check(cache)
        cache = DynamicCache(config=self.text) if cache is None else cache
        prompt = self.survey(ids, kwargs.get("attention_mask"))
        request = Request(self.layers)
        request.store(_STATE).shared[_STATE] = _State(prompt)
        ride(cache, request, NO_PLAN)
        return args, compat.with_cache(kwargs, cache, module) | ({_PROMPT: prompt} if any(prompt.given) else {})

    def check(self, cache: Any) -> None:
        """Raise for what slots cannot be taken out of."""
        kind = compat.attention_name(self.text)
        if kind not in ("sdpa", "eager"):
            raise UnsupportedError(
                f"evicted() makes masks for sdpa and eager attention, not for {kind}; set_attn_implementation('sdpa')"
            )
        known = (DynamicLayer, DynamicSlidingWindowLayer)
        if cache is not None and (
            any(type(layer) not in known for layer in cache.layers) or getattr(cache, "offloading", False)
        ):
            raise UnsupportedError(
                "slots cannot be taken out of a static cache, nor a quantised or offloaded one; use a dynamic cache"
            )

    def survey(self, ids: Tensor, mask: Any) -> _Prompt:
        """Image tokens and padding of a prompt; the one look from the host."""
        mask = mask.get("full_attention") if isinstance(mask, dict) else mask
        if mask is None:
            real = torch.ones_like(ids, dtype=torch.bool)
        elif mask.ndim == 2:
            real = mask != 0
        else:
            real = visible(mask).any(dim=(1, 2))[:, : ids.shape[1]].expand(ids.shape)
        if not bool(real[:, -1].all()):
            raise InputError(
                "evicted() asks the last prompt row, which is padding here; set"
                " processor.tokenizer.padding_side = 'left'"
            )
        visual = (ids == self.image) & real
        given = visual.sum(1).tolist()
        return _Prompt(visual, real, not bool(real.all()), given, (real.sum(1) - visual.sum(1)).tolist())

    def after_attention(
        self, index: int, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Of an encoder's layer: once a prompt's attention has run, its slots may go."""
        prompt: _Prompt | None = kwargs.get(_PROMPT)
        if prompt is None:
            return
        cache = compat.cache_of(kwargs)
        layer, state = cache.layers[index], _state(cache)
        assert state is not None
        worth = _last_row(
            attn, args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"], layer.keys, prompt.real
        )
        order = worth.masked_fill(~prompt.visual, float("-inf")).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1).masked_fill(~prompt.visual, -1)
        counts = counts_of(self.most[index], prompt.given)
        before = layer.keys.nbytes + layer.values.nbytes
        valid = prompt.real if prompt.padded else None
        if list(counts) != prompt.given:
            keep = rank < torch.tensor(counts, device=rank.device)[:, None]
            places, valid = self.compacted(keep, valid, counts, prompt.text)
            if self.drop:
                layer.keys, layer.values = picked(layer.keys, places), picked(layer.values, places)
            tokens = TokenMap.evicted(None, places, valid, keep.shape[1])
            _request(cache).maps[index] = tokens
            rank = rank.gather(1, places)
        state.layers[index] = _Held(rank, valid, counts)
        prompt.slots.append(layer.keys.shape[-2])
        prompt.bytes = (prompt.bytes[0] + before, prompt.bytes[1] + layer.keys.nbytes + layer.values.nbytes)
        report_original_lengths(cache)

    def compacted(
        self, keep: Tensor, valid: Tensor | None, counts: tuple[int, ...], others: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Places of the slots that stay, and which of them are no fillers; in "mask" mode all places."""
        if self.drop:
            return compacted(keep, valid, [count + other for count, other in zip(counts, others, strict=True)])
        everything = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape)
        return everything, keep if valid is None else keep & valid

    def after_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if (prompt := kwargs.get(_PROMPT)) is not None:
            self.report.slots.append(prompt.slots)
            self.report.bytes.append(prompt.bytes)

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = _state(compat.cache_of(kwargs))
        if state is None or not state.layers:
            return
        state.step += 1
        if self.steps is not None and state.step >= self.steps:
            raise StateError(
                f"this is denoising step {state.step + 1} of a canvas, and evicted() was told of {self.steps}; give"
                " steps=max_denoising_steps"
            )
        self.report.read.append([])

    def before_layer(self, index: int, reads: bool, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of a layer of the encoder, or of the decoder, which ``reads`` the cache."""
        cache = compat.cache_of(kwargs)
        state = _state(cache)
        if state is None or index not in state.layers or _PROMPT in kwargs:
            return None
        tokens: TokenMap | None = _request(cache).maps[index]
        seen: Any = cache
        if reads:
            seen, tokens = self.seen(index, state, cache, tokens)
            self.report.read[-1].append(seen.layers[index].keys.shape[-2])
        if tokens is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        width = seen.layers[index].keys.shape[-2] + hidden.shape[1]
        mask = self.mask(tokens, kwargs.get("attention_mask"), width, hidden, reads)
        return args, compat.with_cache(kwargs, seen, layer) | {"attention_mask": mask}

    def seen(self, index: int, state: _State, cache: Any, tokens: TokenMap | None) -> tuple[Any, TokenMap | None]:
        """What a layer of the decoder reads in the present step: the cache, or a view of it, and its map."""
        held, prompt, layer = state.layers[index], state.prompt, cache.layers[index]
        share = share_of(self.schedule, state.step if self.steps else 0, self.steps or 1, index, self.layers)
        counts = tuple(map(min, counts_of(share, prompt.given), held.counts))
        if counts == held.counts:
            return cache, tokens
        slots = layer.keys.shape[-2]
        if held.view is None or held.view[0] != (slots, counts):
            later = slots - held.rank.shape[1]  # of finished canvases
            keep = held.rank < torch.tensor(counts, device=held.rank.device)[:, None]
            keep = nn.functional.pad(keep, (0, later), value=True)
            valid = None if held.valid is None else nn.functional.pad(held.valid, (0, later), value=True)
            places, valid = self.compacted(keep, valid, counts, [text + later for text in prompt.text])
            view = cache
            if self.drop:
                part = SimpleNamespace(keys=picked(layer.keys, places), values=picked(layer.values, places))
                view = SimpleNamespace(layers={index: part}, is_compileable=False)
            held.view = (slots, counts), view, TokenMap.evicted(tokens, places, valid, slots)
        return held.view[1:]

    def mask(self, tokens: TokenMap, given: Tensor | None, width: int, hidden: Tensor, reads: bool) -> Tensor | None:
        """The mask ``[batch, 1, query, width]`` over the slots that a layer sees, from that over all."""
        queries, eager = hidden.shape[1], compat.attention_name(self.text) == "eager"
        if given is None and tokens.valid is not None and reads:
            given = torch.ones(1, 1, queries, width + tokens.removed, dtype=torch.bool, device=hidden.device)
        if eager and given is not None and given.dtype == torch.bool:
            given = additive(given, hidden.dtype)
        start = width + tokens.removed - queries
        return tokens.mask(given, start, queries, width, hidden.dtype if eager else None)


def _last_row(attn: Any, hidden: Tensor, tables: tuple[Tensor, Tensor], keys: Tensor, real: Tensor) -> Tensor:
    """Attention of the last row on all slots, mean over heads: float32 ``[batch, slots]``."""
    cos, sin = (table[:, -1:] for table in tables)
    with torch.no_grad():
        query = attn.q_norm(attn.q_proj(hidden[:, -1:]).unflatten(-1, (-1, attn.head_dim))).transpose(1, 2)
        return gaze(rotated(attn, query, (cos, sin)), keys, real, attn.scaling)[:, 0]
