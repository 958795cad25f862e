"""Fewer image tokens in models that write by denoising: schedules over steps and layers, rows that go, slots that go.

Experimental: tried on a toy denoiser and on tiny random models only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmattn.errors import OptionError, StateError, UnsupportedError
from vlmattn.request import Plan, Request, TokenMap, closed_up
from vlmattn.wrapping.dropping import speak_original
from vlmattn.wrapping.merged import REQUEST

Score = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``score(layer, hidden, answer)``: what each row is worth, ``[batch, rows]``, to the rows where ``answer`` bool ``[batch, rows]`` is set."""


class Schedule(Protocol):
    """How many image tokens a layer sees in a denoising step."""

    def keep(self, step: int, steps: int, layer: int, layers: int) -> float:
        """Share of the image tokens, 0..1, in step ``step`` of ``steps`` and layer ``layer`` of ``layers``, both from 0."""
        ...


def _check(**shares: float) -> None:
    for name, value in shares.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise OptionError(f"{name} must be a share within 0..1, got {value!r}")


@dataclass(frozen=True)
class Constant:
    """The same share in all steps and in layers from ``layer`` on (LLaDA-FastV, arXiv 2601.20168)."""

    share: float = 0.5
    layer: int = 0

    def __post_init__(self) -> None:
        _check(share=self.share)

    def keep(self, step: int, steps: int, layer: int, layers: int) -> float:
        return self.share if layer >= self.layer else 1.0


@dataclass(frozen=True)
class Progressive:
    """From ``first`` in the first step to ``last`` in the last one, evenly: later steps mend what earlier ones lost (arXiv 2511.15098)."""

    first: float = 1.0
    last: float = 0.25

    def __post_init__(self) -> None:
        _check(first=self.first, last=self.last)

    def keep(self, step: int, steps: int, layer: int, layers: int) -> float:
        return self.first + (self.last - self.first) * step / max(steps - 1, 1)


@dataclass(frozen=True)
class LateStep:
    """All image tokens until the share ``begin`` of the steps is over, then ``share`` (arXiv 2511.15098)."""

    begin: float = 0.5
    share: float = 0.25

    def __post_init__(self) -> None:
        _check(begin=self.begin, share=self.share)

    def keep(self, step: int, steps: int, layer: int, layers: int) -> float:
        return self.share if step >= self.begin * steps else 1.0


@dataclass(frozen=True)
class LayerSkip:
    """Image rows pass by the layers ``skipped``, but for ``share`` of them (for models that began autoregressive, arXiv 2511.15098)."""

    skipped: tuple[int, ...]
    share: float = 0.0

    def __post_init__(self) -> None:
        _check(share=self.share)

    def keep(self, step: int, steps: int, layer: int, layers: int) -> float:
        return self.share if layer in self.skipped else 1.0


def content_attention(layer: nn.Module, hidden: Tensor, answer: Tensor) -> Tensor:
    """Attention that answer rows pay to every row by content, mean over heads and answer rows: ``[batch, rows]``.

    From the layer's query and key projections, without rotation or norms of theirs (ours); the answer rows only, never rows x rows.

    Raises:
        UnsupportedError: no ``self_attn`` with ``q_proj`` and ``k_proj`` of one width; give a score of your own.
    """
    attn: Any = getattr(layer, "self_attn", None)
    if attn is None or not all(hasattr(attn, name) for name in ("q_proj", "k_proj")):
        raise UnsupportedError("the layer has no self_attn with q_proj and k_proj; give score=...")
    normed = layer.input_layernorm(hidden) if hasattr(layer, "input_layernorm") else hidden  # type: ignore[operator]
    rows = answer.any(0).nonzero().flatten()
    query, key = attn.q_proj(normed[:, rows]), attn.k_proj(normed)
    dim = getattr(attn, "head_dim", None) or query.shape[-1] // getattr(attn, "num_heads", 1)
    query, key = (states.view(*states.shape[:2], -1, dim).transpose(1, 2).float() for states in (query, key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    share = (query @ key.transpose(2, 3) * dim**-0.5).softmax(-1).mean(1)  # [batch, answer, rows]
    there = answer[:, rows, None]
    found: Tensor = (share * there).sum(1) / there.sum(1).clamp_min(1)
    return found


@dataclass
class Thinning:
    """What ``thinned`` does, as it goes: ``rows[step][layer]`` is how many rows the layer computed.

    Attributes:
        steps: denoising steps, forwards of the stack; step: the present one.
    """

    steps: int
    step: int = -1
    rows: list[list[int]] = field(default_factory=list)
    scores: Tensor | None = None


@contextmanager
def thinned(
    layers: Sequence[nn.Module],
    visual: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    real: Tensor | None = None,
    answer: Tensor | None = None,
    select: int = 0,
    score: Score = content_attention,
) -> Iterator[Thinning]:
    """Let the layers of a bidirectional denoiser compute fewer image rows, for the block.

    In step s and layer l the round(keep(s, l) n) of n image tokens with the highest scores go through; the others pass the
    layer unchanged. Scores are taken once, in the first step, when layer ``select`` is entered, and hold for all steps; until
    then every image token goes through, unless none is kept.

    Args:
        layers: decoder layers in order; each gets ``hidden_states`` ``[batch, rows, hidden]`` first, and may get
            ``attention_mask`` (2D, or 4D ``[batch or 1, heads or 1, rows or 1, rows]``), ``position_embeddings`` and
            ``position_ids`` by keyword.
        visual: bool ``[batch, rows]``, image tokens. real: False for padding; None = none.
        answer: bool ``[batch, rows]``, rows whose gaze counts; None = all that are no image tokens.
        schedule: see ``Schedule``. steps: forwards of the stack in one answer.
        score: see ``Score``.

    Raises:
        StateError: more forwards than steps.
        UnsupportedError: layers that read a cache.
    """
    state = Thinning(steps)
    real = torch.ones_like(visual) if real is None else real
    visual = visual & real
    asked = ~visual & real if answer is None else answer & real
    given: list[int] = visual.sum(1).tolist()
    text: list[int] = (real.sum(1) - visual.sum(1)).tolist()
    held: dict[int, tuple[Tensor, Tensor]] = {}

    def before(number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if kwargs.get("past_key_values") is not None:
            raise UnsupportedError(
                "the layers read a cache; thinned() is for denoisers that see all rows in every step"
            )
        if number == 0:
            state.step += 1
            state.rows.append([])
            if state.step >= steps:
                raise StateError(
                    f"this is forward {state.step + 1} of a denoiser of {steps} steps; begin a new thinned()"
                )
        if number == select and state.step == 0:
            state.scores = score(layer, hidden, asked.to(hidden.device)).float()
        share = schedule.keep(state.step, steps, number, len(layers))
        counts = [round(share * count) for count in given]
        if counts == given or (state.scores is None and any(counts)):
            state.rows[-1].append(hidden.shape[1])
            return None
        place, there = visual.to(hidden.device), real.to(hidden.device)
        worth = torch.zeros(place.shape, device=hidden.device) if state.scores is None else state.scores
        order = worth.masked_fill(~place, float("-inf")).argsort(dim=1, descending=True, stable=True)
        keep = ~place | (order.argsort(dim=1) < torch.tensor(counts, device=hidden.device)[:, None])
        rows, valid = closed_up(keep, there, [n + words for n, words in zip(counts, text, strict=True)])
        held[number] = hidden, rows
        state.rows[-1].append(rows.shape[1])
        narrow = {"hidden_states": _rows(hidden, rows), **_narrowed(kwargs, rows, valid)}
        return ((narrow.pop("hidden_states"), *args[1:]), {**kwargs, **narrow}) if args else ((), {**kwargs, **narrow})

    def after(number: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if number not in held:
            return None
        hidden, rows = held.pop(number)
        new = output[0] if isinstance(output, tuple) else output
        whole = hidden.scatter(1, rows[..., None].expand(-1, -1, hidden.shape[-1]), new)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    hooks = []
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(partial(before, number), with_kwargs=True))
        hooks.append(layer.register_forward_hook(partial(after, number)))
    try:
        yield state
    finally:
        for hook in hooks:
            hook.remove()


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """``[batch or 1, rows, ...]`` at ``rows`` ``[batch, kept]``."""
    index = rows.view(*rows.shape, *(1,) * (values.ndim - 2)).expand(*rows.shape, *values.shape[2:])
    return values.expand(len(rows), *values.shape[1:]).gather(1, index)


def _narrowed(kwargs: dict[str, Any], rows: Tensor, valid: Tensor | None) -> dict[str, Any]:
    """What a layer gets besides the residual stream, for some of the rows."""
    found: dict[str, Any] = {}
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        found["attention_mask"] = _rows(mask, rows)
    elif isinstance(mask, Tensor):
        wide = mask.expand(len(rows), -1, -1, -1)
        if wide.shape[2] > 1:
            wide = _rows(wide.transpose(1, 2), rows).transpose(1, 2)
        found["attention_mask"] = wide.gather(3, rows[:, None, None].expand(*wide.shape[:3], -1))
    if valid is not None:
        hidden = ~valid[:, None, None]
        known = found.get("attention_mask")
        if known is None:
            found["attention_mask"] = ~hidden
        elif known.ndim == 2:
            found["attention_mask"] = known.masked_fill(~valid, 0)
        else:
            least = False if known.dtype == torch.bool else torch.finfo(known.dtype).min
            found["attention_mask"] = known.masked_fill(hidden, least)
    if (ids := kwargs.get("position_ids")) is not None:
        found["position_ids"] = _rows(ids, rows)
    if (tables := kwargs.get("position_embeddings")) is not None:
        found["position_embeddings"] = tuple(_rows(table, rows) for table in tables)
    return found


@contextmanager
def evicted(model: Any, keep_ratio: float = 0.5, *, mode: str = "drop") -> Iterator[list[tuple[int, ...]]]:
    """Let a DiffusionGemma model keep part of the image tokens between reading the prompt and denoising, for the block.

    Its encoder writes keys and values once; every denoising step of every canvas reads them. In layers with full attention
    only the round(keep_ratio n) image tokens stay that the last prompt row attends to most, mean over heads, layer by layer;
    sliding layers are left alone. ``mode`` "mask" hides the others instead: the same choice, to compare with.

    Yields a list that gets, for each prompt, the cached slots of each layer with full attention.

    Raises:
        OptionError: a ratio out of 0..1, no such mode.
        UnsupportedError: another model, a static cache.
    """
    _check(keep_ratio=keep_ratio)
    if mode not in ("drop", "mask"):
        raise OptionError(f"mode must be drop or mask, got {mode!r}")
    if getattr(getattr(model, "config", None), "model_type", None) != "diffusion_gemma":
        raise UnsupportedError(
            f"evicted() knows diffusion_gemma models only, not {type(model).__name__}; see thinned()"
        )
    eviction = _Eviction(model, keep_ratio, mode == "drop")
    hooks = [model.model.encoder.register_forward_pre_hook(eviction.before_encoder, with_kwargs=True)]
    kinds = model.config.get_text_config().layer_types
    for index in (index for index, kind in enumerate(kinds) if kind == "full_attention"):
        encoder, decoder = model.model.encoder.language_model.layers[index], model.model.decoder.layers[index]
        hooks.append(
            encoder.self_attn.register_forward_hook(partial(eviction.after_attention, index), with_kwargs=True)
        )
        for layer in (encoder, decoder):
            hooks.append(layer.register_forward_pre_hook(partial(eviction.before_layer, index), with_kwargs=True))
    try:
        yield eviction.slots
    finally:
        for hook in hooks:
            hook.remove()


class _Eviction:
    """The hooks of ``evicted``. What a layer's cache still holds rides on the cache, as for ``wrap``."""

    def __init__(self, model: Any, keep_ratio: float, drop: bool) -> None:
        self.text, self.image = model.config.get_text_config(), model.config.image_token_id
        self.keep_ratio, self.drop = keep_ratio, drop
        self.visual: Tensor | None = None
        self.real: Tensor | None = None
        self.slots: list[tuple[int, ...]] = []

    def before_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, cache = args[0] if args else kwargs.get("input_ids"), kwargs.get("past_key_values")
        fresh = cache is None or int(cache.get_seq_length()) == 0
        self.visual = ids == self.image if fresh and ids is not None else None
        if self.visual is None:
            return
        if cache is not None and any(hasattr(layer, "max_cache_len") for layer in cache.layers):
            raise UnsupportedError("slots cannot be taken out of a static cache; use a dynamic cache")
        mask = kwargs.get("attention_mask")
        mask = mask.get("full_attention") if isinstance(mask, dict) else mask
        if mask is None:
            self.real = torch.ones_like(self.visual)
        elif mask.ndim == 2:
            self.real = mask != 0
        else:
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            self.real = seen.any(dim=(1, 2))[:, : self.visual.shape[1]].expand(self.visual.shape)
        self.visual = self.visual & self.real
        self.slots.append(())

    def after_attention(
        self, index: int, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        cache = kwargs.get("past_key_values")
        if self.visual is None or cache is None or not bool(self.visual.any()):
            return
        assert self.real is not None
        layer, hidden = cache.layers[index], args[0] if args else kwargs["hidden_states"]
        cos, sin = (table[:, -1:] for table in kwargs["position_embeddings"])
        with torch.no_grad():
            query = attn.q_norm(attn.q_proj(hidden[:, -1:]).unflatten(-1, (-1, attn.head_dim)))
            query = sys.modules[type(attn).__module__].apply_rotary_pos_emb(query, cos, sin, unsqueeze_dim=2)
            key = layer.keys.repeat_interleave(attn.num_key_value_groups, 1).float()
            scores = (query.transpose(1, 2).float() @ key.transpose(2, 3))[:, :, 0] * attn.scaling
            gaze = scores.masked_fill(~self.real[:, None], float("-inf")).softmax(-1).mean(1)
        given, real = self.visual.sum(1).tolist(), self.real.sum(1).tolist()
        counts = [round(self.keep_ratio * count) for count in given]
        order = gaze.masked_fill(~self.visual, float("-inf")).argsort(dim=1, descending=True, stable=True)
        keep = ~self.visual | (order.argsort(dim=1) < torch.tensor(counts, device=order.device)[:, None])
        keys = layer.keys.shape[-2]
        if self.drop:
            left = [n - count + stay for n, count, stay in zip(real, given, counts, strict=True)]
            places, valid = closed_up(keep, self.real, left)
            layer.keys, layer.values = (
                states.gather(2, places[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1]))
                for states in (layer.keys, layer.values)
            )
        else:
            places, valid = torch.arange(keys, device=keep.device).expand(keep.shape), keep & self.real
        request = getattr(cache, REQUEST, None)
        if request is None:
            request = Request(Plan("evicted", by_layer=((),) * self.text.num_hidden_layers))
            setattr(cache, REQUEST, request)
        request.maps[index] = TokenMap.evicted(None, places, valid, keys)
        speak_original(cache)
        self.slots[-1] += (layer.keys.shape[-2],)

    def before_layer(self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache: Any = kwargs.get("past_key_values")
        request = getattr(cache, REQUEST, None)
        tokens = request.maps[index] if request is not None else None
        if tokens is None or (self.visual is not None and layer.self_attn.is_causal):
            return None  # while the prompt is read nothing is gone yet
        queries, given = (args[0] if args else kwargs["hidden_states"]).shape[1], kwargs.get("attention_mask")
        width = cache.layers[index].keys.shape[-2] + queries
        if given is None and tokens.valid is not None and not layer.self_attn.is_causal:
            given = torch.ones(1, 1, queries, width + tokens.removed, dtype=torch.bool, device=tokens.slots.device)
        additive = None
        if self.text._attn_implementation == "eager":
            hidden = args[0] if args else kwargs["hidden_states"]
            additive = hidden.dtype
            if given is not None and given.dtype == torch.bool:
                given = torch.zeros_like(given, dtype=additive).masked_fill(~given, torch.finfo(additive).min)
        start = width + tokens.removed - queries
        return args, {**kwargs, "attention_mask": tokens.mask(given, start, queries, width, additive)}
