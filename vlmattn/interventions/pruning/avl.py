"""A-VL: image tokens in three tiers, text by what it was worth (arXiv 2409.14846)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError
from vlmattn.interventions.base import last_row
from vlmattn.interventions.pruning.policy import KVPolicy, best, hold_images, host_counts, image_tokens, slots_of
from vlmattn.kernels import AttentionEdit
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import Eviction, LayerContext, Weights


@register(
    "avl",
    paper="arXiv:2409.14846 (AAAI 2025)",
    code="released; its modified model code was not read",
    faithful="paper text (a summary of it), released defaults",
    parts="keep + read",
    cost="prefill: one attention row a layer; decode: fewer keys are held, and fewer of those are read",
    presets={
        "avl": ("released settings: half of the image tokens held, 35 % read, text pruned", {}),
        "avl_images": ("the same, text stays whole", {"text_keep": 1.0}),
    },
)
@dataclass(frozen=True, kw_only=True)
class AVL(KVPolicy):
    """Hold the image tokens that matter, read those that matter most, and look at all of them now and then.

    With s_j the unedited attention of the last row on slot j, mean over heads, layer by layer:

        prompt:            secondary = the round(keep_secondary n) image tokens with the highest s, core = the
                           round(keep_core n) of them; the others are evicted
        ordinary step:     text, what was generated and core are read
        every refresh-th:  everything is read, and core is chosen anew for the steps that follow
        every text_every-th step: of t text tokens max(round(text_keep t), text_first) stay: the first ``text_first``,
                           the most recent half of them, and those with the highest sum of s over the steps so far

    Ours, where the paper is silent: the split of kept text in halves (as H2O has it), and that sums of s begin with the
    last prompt row. Combine with ``fastv`` for the paper's filter of the prompt. Counts evicted slots.

    Raises:
        OptionError: more core than secondary tokens.
        UnsupportedError: a static cache, no cache.
    """

    keep_secondary: float = option(0.5, 0, 1, "share of the image tokens that is held", source="released: .5 deleted")
    keep_core: float = option(
        0.35, 0, 1, "share of the image tokens that ordinary steps read", source="released: .6 to .7 not read"
    )
    refresh: int = option(3, 1, 10**6, "every so many steps all held tokens are read", source="released: 3")
    text_keep: float = option(0.6, 0, 1, "share of text that stays", source="released: .4 to .5 pruned")
    text_every: int = option(8, 1, 10**6, "every so many steps text is pruned", source="released: 8")
    text_first: int = option(20, 0, 10**6, "first text tokens that always stay", source="released: 20")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_core > self.keep_secondary:
            raise OptionError(
                f"avl.keep_core {self.keep_core:g} must not exceed keep_secondary {self.keep_secondary:g}"
            )

    def at(self, share: float) -> AVL:
        return replace(self, keep_secondary=share, keep_core=share * self.keep_core / self.keep_secondary)

    def cached(self, layer: int, images: int, text: int, kv_heads: int) -> tuple[float, float]:
        """Before text is pruned."""
        held = min(round(self.keep_secondary * images), images) + text
        core = min(round(self.keep_core * images), held - text) + text
        return held, ((self.refresh - 1) * core + held) / self.refresh

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return self.active_layers(anatomy)

    @property
    def follows_attention(self) -> bool:
        return True

    def _refreshes(self, context: LayerContext) -> bool:
        return not context.step.is_prompt and self.generated(context) % self.refresh == 0

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        self.refuse_cropped(context)
        if not (context.step.is_prompt or self._refreshes(context) or self.text_keep < 1):
            return
        self.advance(context)
        kept, seen = context.store(self), last_row(context, weights).mean(1)
        paid = kept.by_slot("paid", 0, torch.float32)
        paid.write(0, seen + paid.read(context.keys, context.device) if paid.written else seen)
        if self._refreshes(context):
            self._choose_core(context, seen)
        elif context.step.is_prompt:
            kept.by_slot("gaze", 0, torch.float32).write(0, seen)

    def _choose_core(self, context: LayerContext, seen: Tensor) -> None:
        kept = context.store(self)
        kept.by_slot("core", False, torch.bool).write(0, best(seen, image_tokens(context), kept.rows["core"]))

    def edit(self, context: LayerContext) -> AttentionEdit:
        if context.step.is_prompt or self._refreshes(context):
            return AttentionEdit()
        kept = context.store(self)
        wanted = ~context.visual | kept.slots["core"].read(context.keys, context.device)
        if (real := context.real) is not None:
            wanted = wanted & real
        tiers = zip(kept.rows["secondary"], kept.rows["core"], kept.rows["others"], strict=True)
        most = max(context.keys - hold - pad + read for hold, read, pad in tiers)
        return AttentionEdit(read=slots_of(wanted, most))

    def evict(self, context: LayerContext) -> Eviction | None:
        kept = context.store(self)
        if context.step.is_prompt:
            images, text = host_counts(context.request, context.keys)
            given = kept.rows.setdefault("given", images)
            secondary = [min(round(self.keep_secondary * n), left) for n, left in zip(given, images, strict=True)]
            core = [min(round(self.keep_core * n), hold) for n, hold in zip(given, secondary, strict=True)]
            counts = tuple(hold + words for hold, words in zip(secondary, text, strict=True))
            kept.rows |= {"secondary": secondary, "core": core, "others": self._others(context, counts)}
            gaze = kept.slots["gaze"].read(context.keys, context.device)
            self._choose_core(context, gaze)
            return hold_images(context, gaze, secondary, text)
        if self.text_keep == 1 or self.generated(context) % self.text_every or context.queries > 1:
            return None
        return self._prune_text(context)

    def _others(self, context: LayerContext, counts: tuple[int, ...]) -> list[int]:
        """Slots of each sequence that hold none of the ``counts`` tokens that stay."""
        width = max(counts) if self.drops else context.keys
        return [width - count for count in counts]

    def _prune_text(self, context: LayerContext) -> Eviction | None:
        kept = context.store(self)
        secondary, others = kept.rows["secondary"], kept.rows["others"]
        words = [context.keys - hold - pad for hold, pad in zip(secondary, others, strict=True)]
        stay = [min(max(round(self.text_keep * n), self.text_first), n) for n in words]
        if stay == words:
            return None
        text = ~context.visual if context.real is None else ~context.visual & context.real
        number = text.cumsum(1)  # of each text token, from 1
        limits = torch.tensor([words, stay], device=context.device)[..., None]
        recent = number > limits[0] - limits[1] // 2
        first = number <= self.text_first
        scores = kept.slots["paid"].read(context.keys, context.device) + 1e6 * first + 1e3 * recent
        counts = tuple(hold + n for hold, n in zip(secondary, stay, strict=True))
        kept.rows["others"] = self._others(context, counts)
        return Eviction(context.visual | best(scores, text, stay), counts)
