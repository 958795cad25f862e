"""RazorAttention: retrieval heads keep everything, the others a window and the mean of the rest (arXiv 2407.15891)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmattn.anatomy import Anatomy
from vlmattn.interventions.profiles import HeadProfile
from vlmattn.interventions.pruning.headwise import HeadWise
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "razor",
    paper="arXiv:2407.15891 (ICLR 2025)",
    code="not read",
    faithful="experimental",
    parts="keep",
    cost="decode: most heads hold, and read, few tokens; two attention calls a layer",
    presets={"razor": ("constants recalled from the paper, not verified; needs a profile of the model's heads", {})},
)
@dataclass(frozen=True, kw_only=True)
class RazorAttention(HeadWise):
    """Retrieval heads keep every token; the others the first ones, the last ones, and one token for all between.

    Of a prompt of N tokens a KV head that is no retrieval head keeps the first ``sinks``, the last max(``recent``,
    N / ``fraction``), and a compensation token of the dropped set D, to which what leaves the window later is added:

        k = mean_D k_j,  v = mean_D v_j,  softmax term |D| exp(q . k / sqrt(dim))

    Keys are averaged as they are, rotated; the window keeps its length in later turns. Retrieval heads are the
    14/15 ``share`` of KV heads with the highest induction score of a HeadProfile, over all layers, and the 1/15
    ``share`` with the highest echo score (``vlmattn.inspection.score_repeats``); with a profile that has no such
    scores, or another ``score`` named, the ``share`` with the highest of that: ours. Memory is saved, not masked: the
    heads of a layer live in two stores. Counts tokens of heads that were let go after prompts.

    Raises:
        OptionError: no heads and no profile, heads that the model does not have, attention edits in the same layers.
        UnsupportedError: no cache, one that is static, quantized or offloaded, assisted decoding.
    """

    compensate: ClassVar[bool] = True
    sinks: int = option(4, 1, 10**6, "first tokens that every head keeps", source="paper, recalled: N0 = 4")
    recent: int = option(4000, 1, 10**6, "least length of the window", source="paper, recalled: S0 = 4000")
    fraction: float = option(5.0, 1, 10**6, "or this part of the prompt, if more", source="paper, recalled: C = 5")
    share: float = option(0.15, 0, 1, "share of KV heads that keep all", source="paper: 1 % echo, 14 % induction")

    def _chosen(self, found: HeadProfile, anatomy: Anatomy) -> list[tuple[int, int]]:
        if self.score != "retrieval" or not {"echo", "induction"} <= set(found.scores):
            return HeadWise._chosen(self, found, anatomy)
        induction = self._top(found, anatomy, "induction", self.share * 14 / 15)
        return sorted({*induction, *self._top(found, anatomy, "echo", self.share / 15)})

    def window(self, tokens: int) -> int:
        return max(self.recent, int(tokens / self.fraction))
