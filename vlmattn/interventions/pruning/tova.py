"""TOVA: the tokens that the newest one attends to most (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmattn.interventions.pruning.budget import AttentionBudget, above, newest, rows_seen
from vlmattn.kernels import AttentionEdit
from vlmattn.registry import register
from vlmattn.request import LayerContext, Weights


@register(
    "tova",
    paper="arXiv:2401.06104 (EMNLP 2024)",
    code="kvpress' TOVAPress",
    faithful="golden (kept slots after a prompt, kvpress)",
    parts="keep",
    cost="prefill: one attention row a layer; decode: few tokens are held, one more row is looked at each step",
    presets={"tova": ("half of the prompt's tokens, by the newest row; never more", {})},
)
@dataclass(frozen=True, kw_only=True)
class TOVA(AttentionBudget):
    """Hold the K = round(keep_ratio n) of n tokens that the last row attends to most, and never more.

    With s_j the unedited attention of the newest row on slot j, mean over all heads: after the prompt the K highest
    stay, and after every step again, all KV heads alike. The newest token always stays. Counts evicted slots.

    Raises:
        UnsupportedError: a static cache, no cache.
    """

    stepwise: ClassVar[bool] = True

    def look(self, context: LayerContext, weights: Weights, edit: AttentionEdit) -> Tensor:
        return above(rows_seen(context, weights, edit, 1).mean(1, keepdim=True), newest(context, 1))
