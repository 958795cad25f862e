"""One cache for the rows of the main prompt and of its branches, and what every forward on it needs to know.

Rows lie group by group: n rows of the main prompt, then n rows of each branch. Groups whose prompt is shorter are
padded on the left. The library's loops see n rows only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from vlmattn.compat import DynamicLayer, DynamicSlidingWindowLayer, cache_of, joined_states, keeps_state, repeat_rows
from vlmattn.decoding import ContrastiveDecoding
from vlmattn.errors import InputError, StateError, UnsupportedError
from vlmattn.kernels import additive
from vlmattn.models import OF_TOKENS
from vlmattn.request import NO_PLAN, Forward, Part, Plan, Request, Step
from vlmattn.wrapping.cache_layers import RoomyLayer
from vlmattn.wrapping.call import Call
from vlmattn.wrapping.on_cache import BRANCHES, place, plan_on, report_original_lengths, request_on, ride


@dataclass(eq=False)
class ReadPrompt:
    """A prompt that has been read, in ``n`` rows.

    Attributes:
        logits: ``[n, position, vocabulary]`` of the last prompt token, and of drafts after it.
        mask: bool ``[n, prompt]``, False for keys that nobody sees.
        last: position ids ``[..., n, 1]`` of the last prompt token.
        rope: factor on the rotary base.
    """

    cache: DynamicCache
    logits: Tensor
    mask: Tensor
    last: Tensor
    rope: float = 1.0

    @property
    def request(self) -> Request | None:
        """What edits know of these rows; None = no edits."""
        return request_on(self.cache)

    @property
    def plan(self) -> Plan:
        """Whose edits these are."""
        return plan_on(self.cache)

    def seen(self, layer: int) -> Tensor:
        """bool ``[n, slots]``: keys of a layer that somebody sees."""
        tokens = None if self.request is None else self.request.maps[layer]
        if tokens is None:
            return self.mask
        found = torch.ones_like(tokens.slots, dtype=torch.bool) if tokens.valid is None else tokens.valid
        return found.to(self.mask.device)

    def repeated(self, times: int) -> ReadPrompt:
        """Every row ``times`` times, one after another, as generate() repeats its inputs for beams."""
        if times == 1:
            return self
        request, plan = self.request, self.plan
        repeat_rows(self.cache, times)
        if request is not None:
            rows = torch.arange(len(self.mask)).repeat_interleave(times)
            ride(self.cache, request.moved(rows), plan)
        return ReadPrompt(
            self.cache,
            self.logits.repeat_interleave(times, 0),
            self.mask.repeat_interleave(times, 0),
            self.last.repeat_interleave(times, self.last.ndim - 2),
            self.rope,
        )


class BranchCache:
    """The row groups of one call.

    Attributes:
        contrast: branches and rule.
        rows: n, what the library's loops see; groups: main prompt and branches.
        prompt: tokens of the main prompt; longest: slots of the longest prompt of all groups.
        ropes: factors on the rotary base of each group.
        drops: groups hold different tokens in some layers, which no edit acts on then.
    """

    def __init__(self, contrast: ContrastiveDecoding, views: Sequence[ReadPrompt], call: Call, alone: bool) -> None:
        self.contrast, self.call, self._base, self._name = contrast, call.token, call.record.base, call.plan.name
        self._family: Any = call.record.family
        self.rows, self.prompt = views[0].mask.shape
        self.groups, self.ropes = len(views), tuple(view.rope for view in views)
        self.longest = max(view.mask.shape[1] for view in views)
        shifts = [self.longest - view.mask.shape[1] for view in views]
        mask = torch.cat([pad(view.mask, (shift, 0)) for view, shift in zip(views, shifts, strict=True)])
        self._mask = None if bool(mask.all()) else mask.long()
        self._offset = torch.cat([views[0].last - view.last for view in views], views[0].last.ndim - 2)
        self.drops = self.groups > 1 and bool(call.plan.pruning)
        self.requests = [None] * self.groups if self.drops else _moved(views, shifts)
        self._plans = [NO_PLAN if view.request is None else view.plan for view in views]
        for request in self.requests:
            if request is not None:
                request.call = call.token
        self._window, self._attending = call.record.anatomy.window, call.record.anatomy.attending
        self._alone, self._ledger, self._rule = alone, call.ledger, call.plan.rule
        self._seen: dict[int, Tensor] = {}

    def fill(self, cache: Any, views: Sequence[ReadPrompt]) -> None:
        """Move the keys and values of all groups into the cache of the call."""
        for number, parts in enumerate(zip(*(view.cache.layers for view in views), strict=True)):
            if self.drops:
                self._seen[number] = self._seen_in(number, views)
            layer: Any = cache.layers[number] if number < len(cache.layers) else None
            if keeps_state(parts[0]):
                cache.layers[number] = joined_states(parts)
                continue
            if (states := self._joined(number, parts, layer)) is None:  # a layer that reads the keys of another
                continue
            if getattr(parts[0], "is_sliding", False):
                self._fill_window(layer, parts, *states)
            elif type(layer) is DynamicLayer and not cache.offloading:
                cache.layers[number] = RoomyLayer(*states)
            else:
                if layer is not None:
                    _make_room(layer, len(states[0]), self.longest - self.prompt)
                cache.update(*states, number)
        setattr(cache, BRANCHES, self)
        if self.drops:
            report_original_lengths(cache)
        if not self._alone:
            cache.reorder_cache = MethodType(_reorder_cache, cache)  # bound, so that a deep copy reorders itself

    def _joined(self, number: int, parts: Sequence[Any], layer: Any) -> tuple[Tensor, Tensor] | None:
        """Keys and values of a layer for all groups, padded on the left; None if it has none of its own."""
        sliding = getattr(parts[0], "is_sliding", False)
        if not hasattr(parts[0], "keys") or (sliding and type(layer) is not DynamicSlidingWindowLayer):
            raise UnsupportedError(
                f"the decoding rule of '{self._name}' cannot share this cache among branches,"
                f" {type(layer or parts[0]).__name__}; use a dynamic cache of a model with attention in every layer"
            )
        held = [part.keys.shape[-2] for part in parts if part.keys is not None]
        if not held:
            return None
        if len(held) < len(parts) or (not self._attends(number) and len(set(held)) > 1):
            raise UnsupportedError(
                f"the branches of '{self._name}' must have as many images as the prompt, whose image keys layer"
                f" {number} keeps for cross-attention; use a rule that changes the image, like vcd"
            )

        def joined(name: str) -> Tensor:
            return torch.cat([pad(getattr(part, name), (0, 0, max(held) - part.keys.shape[-2], 0)) for part in parts])

        return joined("keys"), joined("values")

    def _seen_in(self, layer: int, views: Sequence[ReadPrompt]) -> Tensor:
        """bool ``[groups n, slots]``: keys of a layer that somebody sees, once all groups lie in one cache."""
        each = [view.seen(layer) for view in views]
        longest = max(seen.shape[1] for seen in each)
        return torch.cat([pad(seen, (longest - seen.shape[1], 0)) for seen in each])

    def removed(self, layer: int) -> int:
        """By how many slots a layer is shorter than the longest prompt."""
        return self.longest - self._seen[layer].shape[1]

    def inputs_of(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of a layer with a mask ``[groups n, 1, query, key]`` of the keys that it holds."""
        queries, held = hidden.shape[1], int(cache_of(kwargs).layers[layer].get_seq_length())
        seen = self._seen[layer].to(hidden.device)
        rows = torch.ones(queries, held + queries, dtype=torch.bool, device=hidden.device).tril(held)
        mask = rows & pad(seen, (0, held + queries - seen.shape[1]), value=True)[:, None, None]
        return {**kwargs, "attention_mask": additive(mask, hidden.dtype) if self._base == "eager" else mask}

    def _fill_window(self, layer: Any, parts: Sequence[Any], keys: Tensor, values: Tensor) -> None:
        """Each group holds the last tokens of its own prompt."""
        if getattr(layer, "record_past", False) and any(part.get_seq_length() > part.keys.shape[-2] for part in parts):
            raise UnsupportedError(
                f"the decoding rule of '{self._name}' cannot take drafts back from a sliding window of {self._window}"
                " tokens; leave assisted decoding out (assistant_model, prompt_lookup_num_tokens), or use a shorter"
                " prompt"
            )
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, self.longest

    def _attends(self, layer: int) -> bool:
        """The layer's keys are those of the tokens."""
        return self._attending is None or layer in self._attending

    def check(self, call: Call | None) -> None:
        """Raise unless this forward belongs to the call that filled the cache."""
        if call is None or call.token is not self.call:
            raise StateError(
                f"this cache was filled by generate() with the decoding rule of '{self._name}' and holds its branches"
                " too; it cannot be continued: start a new generate() with a new cache"
            )

    def expand(self, input_ids: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Inputs of a step for all groups, from those of the main rows."""
        found, new = dict(kwargs), input_ids.shape[1] - self.prompt
        found["attention_mask"] = None
        if self._mask is not None:
            found["attention_mask"] = torch.cat([self._mask, self._mask.new_ones(len(self._mask), new)], 1)
        tokens = found.get("next_sequence_length") or input_ids.shape[1]
        positions = found["position_ids"][..., -tokens:]
        shape = (*positions.shape[:-2], self.rows, positions.shape[-1])
        rows = (1,) * (positions.ndim - 2) + (self.groups, 1)
        found["position_ids"] = positions.expand(shape).repeat(rows) - self._offset.to(positions.device)
        for name in (*OF_TOKENS, "cross_attention_mask"):
            if isinstance(found.get(name), Tensor):
                found[name] = found[name].repeat(self.groups, *(1,) * (found[name].ndim - 1))
        return input_ids.repeat(self.groups, 1), found

    def forward(self, cache: Any, tokens: int) -> Forward:
        """What the decoder has to know of a forward of ``tokens`` new tokens."""
        start = None if tokens == 1 else int(cache.get_seq_length())
        parts: list[Part] = []
        for number, (request, plan) in enumerate(zip(self.requests, self._plans, strict=True)):
            rows = slice(number * self.rows, (number + 1) * self.rows)
            if request is None and parts and parts[-1].step is None:
                parts[-1] = Part(slice(parts[-1].rows.start, rows.stop))
                continue
            step = None if request is None else Step(request, self._base, start, recipe=plan.name)
            if step is not None and start is None and (plan.extending or self._window):
                place(step, cache)
            parts.append(Part(rows, step, plan))
        return Forward(tuple(parts), dict.fromkeys(self.contrast.layers), branches=self)

    def scores(
        self, model: nn.Module, groups: Sequence[Tensor], early: Mapping[int, Tensor | None], t: Tensor
    ) -> Tensor:
        """Combined logits ``[n, position, vocabulary]``, float32."""
        self._ledger.add(("fired", self._rule))
        main, *others = (logits.float() for logits in groups)
        for layer in self.contrast.layers:
            hidden = early[layer]
            assert hidden is not None
            others.append(
                self._family.logits(model, hidden[: self.rows, -main.shape[1] :], self.contrast.normed).to(main)
            )
        found = self.contrast.rule(main, [other.to(main.device) for other in others], t)
        if not isinstance(found, Tensor) or found.shape != main.shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"the rule of '{self._name}' must return logits of shape {tuple(main.shape)}, got {what}")
        return found

    def combine(self, model: nn.Module, cache: Any, output: Any, early: Mapping[int, Tensor | None]) -> None:
        """After a forward of all groups: leave the rows that the library knows, with combined logits."""
        groups = output.logits.chunk(self.groups)
        positions = groups[0].shape[1]
        last = cache.get_seq_length() - self.longest + 1  # not counted: drafts are taken back
        t = last - positions + 1 + torch.arange(positions, device=output.logits.device)
        output.logits = self.scores(model, groups, early, t)
        for name in ("attentions", "hidden_states"):
            if output.get(name) is not None:
                output[name] = tuple(None if found is None else found[: self.rows] for found in output[name])
        if output.get("attentions") is not None:  # slots before the main prompt are padding for longer ones
            shift = self.longest - self.prompt
            output["attentions"] = tuple(
                None if found is None else found[..., shift:] for found in output["attentions"]
            )


def _moved(views: Sequence[ReadPrompt], shifts: Sequence[int]) -> list[Request | None]:
    """What edits know of each group, where its prompt has moved to the right."""
    return [
        view.request.moved(shift=shift) if view.request is not None and shift else view.request
        for view, shift in zip(views, shifts, strict=True)
    ]


def forget_branches(cache: Any) -> None:
    """A cache that was reset is like a new one."""
    if branches_on(cache) is not None and int(cache.get_seq_length()) == 0:
        delattr(cache, BRANCHES)
        cache.__dict__.pop("reorder_cache", None)


def branches_on(cache: Any) -> BranchCache | None:
    """The row groups on a cache, if it has some."""
    return getattr(cache, BRANCHES, None)


def _make_room(layer: Any, rows: int, grown: int) -> None:
    """Static layers are made for the main prompt: longer prompts of branches need room too."""
    if not hasattr(layer, "max_cache_len"):
        return
    if not layer.is_initialized:
        layer.max_cache_len += grown
    elif layer.keys.shape[0] != rows or grown:
        raise StateError(
            f"this static cache was used before, with {layer.keys.shape[0]} rows, and the branches need {rows}"
            f" and {grown} more slots; give a new one"
        )


def _reorder_cache(self: Any, beams: Tensor) -> None:
    branches: BranchCache = getattr(self, BRANCHES)
    rows = torch.cat([beams + group * branches.rows for group in range(branches.groups)])
    type(self).reorder_cache(self, rows)
    for request in branches.requests:
        if request is not None:
            request.reorder(beams)
