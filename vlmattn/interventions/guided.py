"""Heads-guided image attention in the middle layers (arXiv 2411.16724)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.interventions.base import LogitEdit
from vlmattn.kernels import LogitPart
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "heads_guided",
    paper="arXiv:2411.16724 (CVPR 2025)",
    code="github.com/ZhangqiJiang07/middle_layers_indicating_hallucinations",
    faithful="golden",
    parts="logit",
    cost="one row of the prefill; decode: a mean over heads per key",
    presets={"heads_guided": ("constants of the released code", {})},
)
@dataclass(frozen=True, kw_only=True)
class HeadsGuided(LogitEdit):
    """Raise the score of every image key by how much all heads care for it.

        s'_{h,j} = s_{h,j} + alpha mean_{h'} |s_{h',j}|    for image keys j

    Scores are the scaled dot products before the mask; the mean is over all heads of the layer. Rows: the one that
    predicts the next token. Counts attention calls edited.
    """

    acts_on = "image keys"
    alpha: float = option(0.5, 0, 10, "strength", source="released code")
    layers: str = option("1/6:1/2+3", about="decoder layers", source="released script: 5..18 of 32, both included")

    def logit(self, context: LayerContext) -> LogitPart | None:
        if not self.alpha:
            return None
        return LogitPart(guide=self.alpha * context.visual.float(), rows=context.rows_that_predict())
