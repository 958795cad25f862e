"""StreamingLLM: the first tokens and the last ones (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmattn.interventions.pruning.budget import BudgetPolicy, above, numbers
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "streaming",
    paper="arXiv:2309.17453 (ICLR 2024)",
    code="kvpress' StreamingLLMPress",
    faithful="golden (kept slots after a prompt, kvpress), positions are ours",
    parts="keep",
    cost="decode: few tokens are held, and read; every step takes one out of each layer",
    presets={"streaming": ("the first four tokens, and the last ones up to half of the prompt's length", {})},
)
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(BudgetPolicy):
    """Hold the first ``sinks`` tokens and the most recent ones, never more than K = round(keep_ratio n) of n.

    After the prompt, and after every step, a layer holds its first ``sinks`` tokens and the last K - ``sinks``. Tokens
    keep their positions, where the paper counts them within the cache. Counts evicted slots.

    Raises:
        UnsupportedError: a static cache, no cache.
    """

    stepwise: ClassVar[bool] = True
    sinks: int = option(4, 0, 10**6, "first tokens that always stay", source="paper: 4")

    def scores(self, context: LayerContext, held: list[int]) -> Tensor:
        number = numbers(context)
        return above(number[:, None].float(), number <= self.sinks)
