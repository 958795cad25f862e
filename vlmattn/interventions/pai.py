"""PAI: paying more attention to the image, its attention part (arXiv 2407.21771)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.interventions.base import LogitEdit
from vlmattn.kernels import LogitPart
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "pai",
    paper="arXiv:2407.21771 (ECCV 2024)",
    code="github.com/LALBJ/PAI",
    faithful="golden (attention part)",
    parts="logit",
    cost="one row of the prefill, one elementwise operation per decode step",
    presets={
        "pai": ("README of the released code: alpha = .2", {}),
        "pai_official": ("the same, by the name that tells whose constants they are", {}),
        "pai_paint": ("alpha = .5, as a script of PAINT's authors runs it", {"alpha": 0.5}),
    },
)
@dataclass(frozen=True, kw_only=True)
class PAI(LogitEdit):
    """Raise the scores of image keys in the row that predicts the next token:  s' = s + alpha |s|.

    Scores are the scaled dot products before the mask. Rows edited: the last prompt row and every generated row. The
    paper's second part, classifier-free refinement of the logits (gamma = 1.1), is a decoding rule and not done here.

    Raises:
        OptionError: alpha outside 0..0.999 (from 1 on a masked key could come back in the released form).
    """

    acts_on = "image keys"
    alpha: float = option(0.2, 0, 0.999, "strength", source="released code and its README commands")
    layers: str = option("2:", about="decoder layers", source="released code: start 2, end 32 of 32")

    def logit(self, context: LayerContext) -> LogitPart | None:
        if not self.alpha:
            return None
        return LogitPart(lift=self.alpha * context.visual.float(), rows=context.rows_that_predict())
