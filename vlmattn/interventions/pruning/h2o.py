"""H2O: heavy hitters, which were attended to most so far, and recent tokens (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmattn.interventions.pruning.budget import AttentionBudget, above, newest, numbers, rows_seen
from vlmattn.kernels import AttentionEdit
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import Eviction, LayerContext, Store, Weights


@register(
    "h2o",
    paper="arXiv:2306.14048 (NeurIPS 2023)",
    code="kvpress' ObservedAttentionPress (the scores); the authors' code was not read",
    faithful="paper text; kept slots of h2o_mean golden (kvpress)",
    parts="keep",
    cost="prefill: all attention is looked at once more; decode: few tokens are held, one more row each step",
    presets={
        "h2o": ("half of the prompt's tokens: a quarter by summed attention, a quarter the most recent", {}),
        "h2o_mean": (
            "mean instead of summed attention, none for being recent, as kvpress has it",
            {"recent": 0.0, "by": "mean"},
        ),
    },
)
@dataclass(frozen=True, kw_only=True)
class H2O(AttentionBudget):
    """Hold heavy hitters and recent tokens, never more than K = round(keep_ratio n) of n.

    With s_j the unedited attention on slot j summed over all rows so far, mean over the query heads of a KV head: after
    the prompt, and after every step, the round(``recent`` K) last tokens and those with the highest s stay, for each
    KV head others. ``by`` "mean" divides s_j by the number of rows that could see j. What was evicted is forgotten.
    Counts evicted slots (of each KV head).

    Raises:
        OptionError: attention edits in the same layers.
        UnsupportedError: a static cache, no cache.
    """

    by_head: ClassVar[bool] = True
    stepwise: ClassVar[bool] = True
    recent: float = option(0.5, 0, 1, "share of the held tokens that are the most recent ones", source="paper: halves")
    by: str = option("sum", about="attention over rows", choices=("sum", "mean"))

    def look(self, context: LayerContext, weights: Weights, edit: AttentionEdit) -> Tensor:
        kept = context.store(self)
        paid = self.by_kv_head(context, rows_seen(context, weights, edit))
        rows = self._rows(context, paid)
        for name, now in (("paid", paid), ("rows", rows)):
            before = kept.rows.get(name)
            kept.rows[name] = now if before is None else now + pad(before, (0, now.shape[-1] - before.shape[-1]))
        total: Tensor = kept.rows["paid"]
        return total / kept.rows["rows"].clamp_min(1) if self.by == "mean" else total

    @staticmethod
    def _rows(context: LayerContext, paid: Tensor) -> Tensor:
        """How many of the newest rows could see each slot, ``[batch, kv_heads, keys]``."""
        number = numbers(context)
        after = number[:, -1:] - number + 1
        new = context.queries if context.real is None else context.of_rows(context.real, True).sum(1, keepdim=True)
        return torch.minimum(after, torch.zeros_like(after) + new)[:, None].expand_as(paid)

    def scores(self, context: LayerContext, held: list[int]) -> Tensor:
        last = torch.tensor([[round(self.recent * n)] for n in held], device=context.device)
        return above(AttentionBudget.scores(self, context, held), newest(context, last))

    def moved(self, kept: Store, found: Eviction, context: LayerContext) -> None:
        if self.drops:
            order, _ = found.order(context.real)
            for name in ("paid", "rows"):
                kept.rows[name] = kept.rows[name].gather(-1, order)
