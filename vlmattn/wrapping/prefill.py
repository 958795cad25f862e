"""Lets methods have the decoder run on other inputs, before a prompt is read or beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.attention import FORWARD
from vlmattn.kernels import additive
from vlmattn.models import Family
from vlmattn.request import Forward, Part, Prefill, SideStream, Step


def prepare(part: Part, family: Family, decoder: nn.Module, kwargs: dict[str, Any]) -> None:
    """Ask the methods of a part, whose prompt the decoder is going to read with ``kwargs``."""
    step, plan = part.step, part.plan
    assert step is not None
    request, length = step.request, step.request.prompt_length
    embeds, given = kwargs["inputs_embeds"][:, :length], kwargs.get("attention_mask")
    positions = None if kwargs.get("position_ids") is None else kwargs["position_ids"][..., :length]
    types, real = request.types(length, embeds.device), request.real(length, embeds.device)
    later = {name: kwargs[name] for name in family.also_given if kwargs.get(name) is not None}
    # without a cache there are generated tokens behind the prompt; what is a list has rows for images alone
    later |= {name: value[:, :length] for name, value in later.items() if isinstance(value, Tensor)}
    mask = _cut(given, length) if given is not None else torch.ones_like(types, dtype=torch.long)

    def passing(watch: Any, keep: Any = None) -> Forward:
        own = Step(request, step.base, 0, recipe=plan.name)
        return Forward((Part(step=own, plan=plan, watch=watch, states=keep),))

    def run(other: Tensor, positions: Tensor | None, watch: Any) -> None:
        decoder(**_inputs(passing(watch), other, mask, positions), **later)

    def states(keep: Any, hidden: Tensor | None = None) -> None:
        places, seen = positions, mask
        if hidden is not None:  # the decoder makes its masks itself
            seen = (~hidden if real is None else real & ~hidden).long()
            places = (seen.cumsum(1) - 1).clamp_min(0) + family.first_position(decoder)
        decoder(**_inputs(passing(lambda *_: None, keep), embeds, seen, places), **later)

    def beside(
        method: Any, slots: Tensor, real: Tensor, positions: Tensor | None, layers: frozenset[int], compare: Any
    ) -> None:
        other = _at(embeds, slots)
        of_tokens = {name: _at(value, slots) for name, value in later.items() if name in family.given_by_token}
        own: Any = decoder.layers
        reading = (family.attention(layer) or family.cross_attention(layer) for layer in own)
        silent = frozenset(number for number, attention in enumerate(reading) if attention is None)
        stream = SideStream(method, layers, compare, other, silent=silent)
        seen = family.text_mask(real)
        if positions is not None:
            positions = positions + family.first_position(decoder)
        if seen.dtype == torch.bool and step.base == "eager":
            seen = additive(seen, other.dtype)
        given = _inputs(passing(stream.watch), other, seen, positions) | of_tokens
        stream.hidden, stream.calls, stream.skipped = _layer_calls(decoder, given, family.in_tuples)
        part.streams += (stream,)

    prefill = Prefill(
        request=request,
        layers=len(plan.by_layer),
        embeds=embeds,
        real=torch.ones_like(types, dtype=torch.bool) if real is None else real,
        visual=types != 0,
        positions=positions,
        run=run,
        states=states,
        beside=beside,
    )
    with torch.no_grad():
        for method in plan.before_prefill:
            method.before_prefill(prefill)


def _at(values: Tensor, slots: Tensor) -> Tensor:
    """Values ``[batch, tokens, ...]`` of the tokens at ``slots`` ``[batch, n]``."""
    return values[torch.arange(len(slots), device=slots.device)[:, None], slots]


def _cut(mask: Any, length: int) -> Any:
    """A mask, or one for each kind of layer, of the first tokens of a prompt."""
    if isinstance(mask, dict):
        return {kind: None if part is None else _cut(part, length) for kind, part in mask.items()}
    return mask[:, :length] if mask.ndim == 2 else mask[..., :length, :length]


def _inputs(passing: Forward, embeds: Tensor, mask: Any, positions: Tensor | None) -> dict[str, Any]:
    """What the decoder gets to run on ``embeds`` ``[batch, tokens, hidden]`` without a cache."""
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": False,
        FORWARD: passing,
    }


#: An input of layers that share an indexer: the keys that the layer before returned behind the residual stream.
_CHOSEN = "prev_topk_indices"


class _Noting(nn.Module):
    """Stands in the place of a decoder layer and notes what the decoder gives it, if it runs it at all."""

    kwargs: dict[str, Any] | None = None

    def __init__(self, layer: nn.Module, in_tuple: int) -> None:
        super().__init__()
        self.kind = {name: value for name, value in vars(layer).items() if name.endswith("type")}
        self._in_tuple = in_tuple

    def __getattr__(self, name: str) -> Any:
        """The decoder may ask for the kind of a layer."""
        kind = self.__dict__.get("kind", {})
        return kind[name] if name in kind else super().__getattr__(name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        return (hidden, *(None,) * (self._in_tuple - 1)) if self._in_tuple else hidden

    def call(self, layer: nn.Module, passed: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """The layer with all that it was given beside the residual stream; nothing for one that was skipped.

        Args:
            passed: what layers pass on to the next one, written as they run.
        """
        if (given := self.kwargs) is None:
            return lambda hidden: hidden

        def run(hidden: Tensor) -> Tensor:
            out = layer(hidden, *self.args, **given | passed)
            if _CHOSEN in given:
                passed[_CHOSEN] = out[1]
            return out[0] if self._in_tuple else out  # type: ignore[no-any-return]

        return run


def _layer_calls(
    decoder: nn.Module, inputs: dict[str, Any], in_tuples: int
) -> tuple[Tensor, tuple[Callable[[Tensor], Tensor], ...], frozenset[int]]:
    """What enters the first layer, the layers with the masks and rotary tables that the decoder makes for them, and
    which of them it skips."""
    layers: Any = decoder.layers
    noting = [_Noting(layer, in_tuples) for layer in layers]
    double = copy.copy(decoder)  # shares all weights; the decoder of other threads stays as it is
    double.__dict__["_modules"] = {**decoder._modules, "layers": nn.ModuleList(noting)}
    type(decoder).forward(double, **inputs)
    passed: dict[str, Any] = {}
    calls = tuple(noted.call(layer, passed) for layer, noted in zip(layers, noting, strict=True))
    skipped = frozenset(layer for layer, noted in enumerate(noting) if noted.kwargs is None)
    return next(noted.hidden for noted in noting if noted.kwargs is not None), calls, skipped
