"""A-VL: image tokens in three tiers, text by what it was worth (arXiv 2409.14846)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmattn.errors import OptionError
from vlmattn.interventions.pruning.policy import KVPolicy, best, find_slots, host_counts, image_tokens, slots_of
from vlmattn.interventions.registry import Sizes, option, register
from vlmattn.kernels import AttentionEdit
from vlmattn.request import Eviction, Scope, Slots, Weights


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

        prompt:            secondary = the round(keep_secondary n) image tokens with the highest s, core = the round(keep_core n)
                           of them; the others are evicted
        ordinary step:     text, what was generated and core are read
        every refresh-th:  everything is read, and core is chosen anew for the steps that follow
        every text_every-th step: of t text tokens max(round(text_keep t), text_first) stay: the first ``text_first``, the most
                           recent half of them, and those with the highest sum of s over the steps so far

    Ours, where the paper is silent: the split of kept text in halves (as H2O has it), and that sums of s begin with the last
    prompt row. Combine with ``fastv`` for the paper's filter of the prompt. Counts evicted slots.

    Raises:
        OptionError: more core than secondary tokens.
        UnsupportedError: a static cache, no cache.
    """

    keep_secondary: float = option(0.5, 0, 1, "share of the image tokens that is held", source="released: .5 deleted")
    keep_core: float = option(
        0.35, 0, 1, "share of the image tokens that ordinary steps read", source="released: .6 to .7 not read"
    )
    refresh: int = option(3, 1, 10**6, "every so many steps all held tokens are read", source="released: 3")
    text_keep: float = option(
        0.6, 0, 1, "share of the text that stays when it is pruned", source="released: .4 to .5 pruned"
    )
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

    def measured_layers(self, sizes: Sizes) -> tuple[int, ...]:
        return self.active_layers(sizes)

    @property
    def measures_generated(self) -> bool:
        return True

    def _refreshes(self, scope: Scope) -> bool:
        return not scope.step.is_prompt and (self.step(scope) + 1) % self.refresh == 0

    def measure(self, scope: Scope, weights: Weights) -> None:
        if not (scope.step.is_prompt or self._refreshes(scope) or self.text_keep < 1):
            return
        start = scope.step.start or 0
        row = scope.request.prompt_length - 1 - start if scope.step.is_prompt else scope.queries - 1
        seen = weights(row, row + 1)[:, :, 0, : scope.keys].mean(1)
        paid: Slots = scope.state(self, "paid", lambda: Slots(0, torch.float32))
        paid.write(0, seen + paid.read(scope.keys, scope.device) if paid.written else seen)
        if self._refreshes(scope):
            self._choose_core(scope, seen)
        elif scope.step.is_prompt:
            gaze: Slots = scope.state(self, "gaze", lambda: Slots(0, torch.float32))
            gaze.write(0, seen)

    def _choose_core(self, scope: Scope, seen: Tensor) -> None:
        core: Slots = scope.state(self, "core", lambda: Slots(False, torch.bool))
        core.write(0, best(seen, image_tokens(scope), scope.request.state[(self, scope.layer, "tiers")][1]))

    def edit(self, scope: Scope) -> AttentionEdit:
        refreshes = self._refreshes(scope)
        self.step(scope, advance=True)
        core: Slots | None = scope.find(self, "core")
        if scope.step.is_prompt or refreshes or core is None:
            return AttentionEdit()
        wanted = ~scope.visual | core.read(scope.keys, scope.device)
        if (real := scope.real) is not None:
            wanted = wanted & real
        secondary, read, others = scope.request.state[(self, scope.layer, "tiers")]
        most = max(scope.keys - hold - pad + some for hold, some, pad in zip(secondary, read, others, strict=True))
        return AttentionEdit(read=slots_of(wanted, most))

    def evict(self, scope: Scope) -> Eviction | None:
        request, key = scope.request, (self, scope.layer, "tiers")
        if scope.step.is_prompt:
            images, text = host_counts(request, scope.keys)
            given = request.state.setdefault((self, scope.layer, "given"), list(images))
            secondary = [min(round(self.keep_secondary * n), left) for n, left in zip(given, images, strict=True)]
            read = [min(round(self.keep_core * n), hold) for n, hold in zip(given, secondary, strict=True)]
            counts = tuple(hold + words for hold, words in zip(secondary, text, strict=True))
            request.state[key] = (secondary, read, self._others(scope, counts))
            gaze = find_slots(self, scope, "gaze")
            self._choose_core(scope, gaze)
            visual = image_tokens(scope)
            return Eviction(~visual | best(gaze, visual, secondary), counts)
        if self.text_keep == 1 or self.step(scope) % self.text_every or scope.queries > 1:  # drafts may be taken back
            return None
        return self._prune_text(scope)

    def _others(self, scope: Scope, counts: tuple[int, ...]) -> list[int]:
        """Slots of each sequence that hold none of the ``counts`` tokens that stay."""
        width = max(counts) if self.drops else scope.keys
        return [width - count for count in counts]

    def _prune_text(self, scope: Scope) -> Eviction | None:
        secondary, read, others = scope.request.state[(self, scope.layer, "tiers")]
        words = [scope.keys - hold - pad for hold, pad in zip(secondary, others, strict=True)]
        stay = [min(max(round(self.text_keep * n), self.text_first), n) for n in words]
        if stay == words:
            return None
        text = ~scope.visual if scope.real is None else ~scope.visual & scope.real
        number = text.cumsum(1)  # of each text token, from 1
        limits = torch.tensor([words, stay], device=scope.device)[..., None]
        recent = number > limits[0] - limits[1] // 2
        first = number <= self.text_first
        paid = find_slots(self, scope, "paid")
        scores = paid + 1e6 * first + 1e3 * recent
        counts = tuple(hold + n for hold, n in zip(secondary, stay, strict=True))
        scope.request.state[(self, scope.layer, "tiers")] = (secondary, read, self._others(scope, counts))
        return Eviction(scope.visual | best(scores, text, stay), counts)
