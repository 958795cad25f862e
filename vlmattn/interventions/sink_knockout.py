"""Knockout of visual sinks, and of as many other image tokens: the control for methods that move attention of sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.interventions.sinks import SinkTest
from vlmattn.kernels import AttentionEdit, MaskPart
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext, Slots

_DRAWS = 2**31  # so many numbers are drawn from


@register(
    "sink_knockout",
    paper="arXiv:2503.03321 (visual sinks carry no content); the controls are ours",
    code="own",
    faithful="paper text",
    parts="mask",
    cost="prefill: dense rows; decode: one comparison per key",
    presets={
        "knockout_sinks": ("text rows do not see image tokens that are sinks", {}),
        "knockout_as_many": ("control: text rows do not see as many image tokens", {"hide": "any"}),
        "knockout_others": ("control: ... as many image tokens that are no sinks", {"hide": "others"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class SinkKnockout(SinkTest):
    """Hide image tokens that are sinks from text rows, or as many others. A tool for analysis.

    In a layer with k sinks in an image (by ``dims``, ``tau``, ``profile`` and ``sinks`` as in VAR) the rows of text and
    of generated tokens do not see

        sinks: these k;   any: k drawn from the image's tokens;   others: k drawn from those that are no sinks, or all

    and the softmax is over what is left. Which token of a prompt is drawn first, second, ... follows from ``seed`` and
    is the same in all layers. If sinks carry no content, hiding them changes little where hiding as many others changes
    much. Counts hidden tokens.
    """

    hide: str = option("sinks", about="image tokens that are hidden", choices=("sinks", "any", "others"))
    seed: int = option(0, 0, 2**31 - 1, "of the draw")

    def hides(self) -> frozenset[str]:
        return frozenset({"text-image"})

    def on_hidden_states(self, context: LayerContext, hidden: Tensor) -> None:
        start = context.keys - context.queries
        pool = (
            context.visual[:, start:] if context.real is None else (context.visual & context.real)[:, start:]
        )  # not dropped
        chosen = self.is_sink(context, hidden) & pool
        if self.hide != "sinks":
            chosen = self._as_many(context, chosen, pool & ~chosen if self.hide == "others" else pool)
        context.count("sink_knockout", chosen.sum())
        context.store(self).by_slot("hidden", False, torch.bool).write(start, chosen)

    def _as_many(self, context: LayerContext, sinks: Tensor, pool: Tensor) -> Tensor:
        """In each image as many tokens of the pool as it has sinks: bool ``[batch, query]``."""
        start = context.keys - context.queries
        image = context.images[:, start:].long() + 1  # 0 for text
        order = context.memo((self, "order"), lambda: self._order(context))[:, start:]
        last = (context.keys + 1) * _DRAWS
        place = torch.where(pool, image * _DRAWS + order, last).argsort(1).argsort(1)  # image by image
        wanted, there = (
            torch.zeros(len(pool), context.keys + 1, dtype=torch.long, device=pool.device).scatter_add_(
                1, image, of.long()
            )
            for of in (sinks, pool)
        )
        before = there.cumsum(1) - there
        return pool & (place - before.gather(1, image) < wanted.gather(1, image))

    def _order(self, context: LayerContext) -> Tensor:
        """A random number for each slot, by its distance from the first real one, whatever was dropped between."""
        tokens, real = context.request.tokens, context.real
        count = context.keys + (0 if tokens is None else tokens.removed)
        numbers = Slots(0, torch.long)
        numbers.write(0, torch.arange(count, device=context.device).expand(len(context.visual), -1))
        slots = context.request.read(numbers, context.keys, context.device)
        if real is not None:
            slots = slots - slots.gather(1, real.int().argmax(1, keepdim=True))
        drawn = torch.randint(_DRAWS, (count,), generator=torch.Generator().manual_seed(self.seed))
        return drawn.to(context.device)[slots.clamp_min(0)]

    def edit(self, context: LayerContext) -> AttentionEdit:
        found = context.store(self).slots.get("hidden")
        if found is None:
            return AttentionEdit()
        rows = context.of_rows(~context.visual, True)
        return AttentionEdit(mask=(MaskPart(rows.int() - 1, context.read(found).int() - 1, 0.0),))
