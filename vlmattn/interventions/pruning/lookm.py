"""LOOK-M: image tokens go first, and what goes is merged into what stays (arXiv 2406.18139)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmattn.interventions.pruning.budget import AttentionBudget, above, newest, real_slots, rows_seen
from vlmattn.kernels import AttentionEdit
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext, Weights

_BLEND = {"pivotal": 0.5, "average": 1.0}
_SLOTS = 512  # that look for their nearest in one go


@register(
    "lookm",
    paper="arXiv:2406.18139 (EMNLP 2024 Findings)",
    code="not read",
    faithful="experimental (paper, recalled)",
    parts="keep",
    cost="prefill: all attention is looked at once more, keys are compared; decode: few tokens are held, and read",
    presets={
        "lookm": ("half of the prompt's tokens, text before images; what goes is merged into its nearest", {}),
        "lookm_drop": ("the same without merging", {"merge": "none"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class LookM(AttentionBudget):
    """Hold recent tokens and heavy hitters, text before image tokens, and merge the others into them.

    With s_j the unedited attention on slot j summed over the prompt's rows, mean over the query heads of a KV head, and
    max_i s_i added to text: the round(``recent`` K) last tokens and the slots with the highest s stay, K =
    round(keep_ratio n) of n in all. Each slot e that goes joins the one that stays and has the most similar key
    (cosine), c(e). Of the L that join c, keys and values alike become

        k_c <- (k_c + sum_e (b k_e + (1 - b) k_c)) / (L + 1),    b = 1/2 for ``merge`` "pivotal", 1 for "average"

    Rotated keys are merged as they are. What is generated stays. Counts evicted slots (of each KV head).

    Raises:
        OptionError: attention edits in the same layers.
        UnsupportedError: a static cache, no cache.
    """

    by_head: ClassVar[bool] = True
    recent: float = option(0.5, 0, 1, "share of the held tokens, the most recent", source="paper, recalled: halves")
    merge: str = option(
        "pivotal", about="what becomes of the others", source="paper", choices=("pivotal", "average", "none")
    )

    def on_queries_keys(self, context: LayerContext, query: Tensor, key: Tensor) -> None:
        AttentionBudget.on_queries_keys(self, context, query, key)
        if context.step.is_prompt and self.merge != "none":
            context.store(self).shared["key"] = key

    def look(self, context: LayerContext, weights: Weights, edit: AttentionEdit) -> Tensor:
        paid = self.by_kv_head(context, rows_seen(context, weights, edit))
        return torch.where(context.visual[:, None], paid, paid + paid.amax(-1, keepdim=True))

    def scores(self, context: LayerContext, held: list[int]) -> Tensor:
        last = torch.tensor([[round(self.recent * n)] for n in held], device=context.device)
        return above(AttentionBudget.scores(self, context, held), newest(context, last))

    def joined(self, context: LayerContext, stays: Tensor) -> tuple[Tensor, float] | None:
        if self.merge == "none":
            return None
        keys: Tensor = context.store(self).shared.pop("key")
        return nearest(keys[:, :, : context.keys], stays, real_slots(context)), _BLEND[self.merge]


def nearest(keys: Tensor, stays: Tensor, real: Tensor) -> Tensor:
    """The slot that stays and has the most similar key, for slots that do not; else the slot itself.

    Args:
        keys: ``[batch, kv_heads, keys, dim]``; stays: bool ``[batch, kv_heads, keys]``; real: bool ``[batch, keys]``.

    Returns:
        int64 ``[batch, kv_heads, keys]``.
    """
    units, found = normalize(keys.float(), dim=-1), []
    for some in torch.split(units, _SLOTS, 2):
        likeness = some @ units.transpose(-1, -2)
        found.append(likeness.masked_fill(~stays[:, :, None], float("-inf")).argmax(-1))
    own = torch.arange(keys.shape[2], device=keys.device)
    return torch.where(stays | ~real[:, None], own, torch.cat(found, 2))
