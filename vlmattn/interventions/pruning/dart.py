"""DART: keep the image tokens that are least like a few pivots (arXiv 2502.11494)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmattn.anatomy import Anatomy
from vlmattn.interventions.pruning.base import ScorerPruning
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import KeptTokens, LayerContext, PruningStage


@register(
    "dart",
    paper="arXiv:2502.11494 (EMNLP 2025)",
    code="github.com/ZichenWen1/DART",
    faithful="golden (the choice; hidden states without the model's last norm are ours)",
    parts="keep",
    cost="prefill: norms of keys and a few cosines in one layer; later layers run on the rest. Decode: fewer keys",
    presets={"dart": ("released: 128 of the 576 tokens of LLaVA-1.5 from layer 2 on (reduction .778)", {})},
)
@dataclass(frozen=True, kw_only=True)
class DART(ScorerPruning):
    """From layer K on go on with a few pivots and the image tokens that are least like one of them.

    With k the keys of layer K - 1 and h the residual stream that enters K, P image pivots (the image tokens of a
    sequence with the largest |k|_1) and Q text pivots (the same of the text behind the images): image pivots in their
    order, then text pivots, each take

        the int(keep_ratio n / (P + Q)) image tokens not taken yet with the lowest cos(h_pivot, h_j)

    so that P + (P + Q) int(keep_ratio n / (P + Q)) of the n image tokens of a sequence stay, at most n. Where there is
    less text than Q tokens, image pivots take again. Kept rows have their order and position ids. The released code
    compares hidden states behind the model's last norm, and goes through pivots in no order. Counts dropped tokens.

    Raises:
        OptionError: ``layer`` 0 or not a layer of the model, or one in which image features still come in (DeepStack).
    """

    layer: int = option(2, 0, 10**4, "K, the first layer that only kept tokens reach", source="released: 2")
    keep_ratio: float = option(0.222, 0, 1, "share of the image tokens that stays", source="released: 1 - .778")
    image_pivots: int = option(4, 1, 10**4, "P", source="released: 4")
    text_pivots: int = option(4, 0, 10**4, "Q", source="released: 4")

    def key_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return (anatomy.attending_before(self.layer),)

    def on_queries_keys(self, context: LayerContext, query: Tensor, key: Tensor) -> None:
        if context.step.is_prompt:
            start = context.step.start or 0
            sizes = key.float().abs().sum((1, 3))[:, start : start + context.queries]
            context.request.store(self).rows["sizes"] = sizes

    def comparing(self, layer: int, given: Sequence[int], width: int) -> int:
        return 2 * width * self._rounds() * sum(given)

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        whole = sum(given)
        return min(self.image_pivots, whole) + self._rounds() * self._each(whole)

    def _rounds(self) -> int:
        return self.image_pivots + self.text_pivots

    def _each(self, whole: int) -> int:
        """Tokens that each pivot takes of ``whole``."""
        share = self.keep_tokens or self.keep_ratio * whole
        return int(share / self._rounds())

    def choose_tokens(self, stage: PruningStage) -> KeptTokens:
        sizes, unit = stage.request.store(self).rows.pop("sizes"), normalize(stage.hidden.float(), dim=-1)
        behind = stage.text & (stage.visual.cumsum(1) > 0)
        keep = torch.zeros_like(stage.visual)
        for row, given in enumerate(stage.given):
            images, text = stage.visual[row].nonzero().flatten(), behind[row].nonzero().flatten()
            first, asked = (
                _largest(sizes[row], slots, count)
                for slots, count in ((images, self.image_pivots), (text, self.text_pivots))
            )
            keep[row, first] = True
            if not len(images):
                continue
            for pivot in islice(chain(first, asked, cycle(first)), self._rounds()):
                left = (stage.visual[row] & ~keep[row]).nonzero().flatten()
                likeness = unit[row, left] @ unit[row, pivot]
                keep[row, left[likeness.argsort(stable=True)[: self._each(sum(given))]]] = True
        return KeptTokens(keep, self.counts(stage))


def _largest(sizes: Tensor, slots: Tensor, count: int) -> Tensor:
    """The ``count`` of some slots with the largest sizes, in their order."""
    return slots[sizes[slots].argsort(descending=True, stable=True)[:count]].sort().values
