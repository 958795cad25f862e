"""PAI: paying more attention to the image, its attention part (arXiv 2407.21771)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmattn.interventions.base import Intervention
from vlmattn.interventions.registry import option, register
from vlmattn.kernels import AttentionEdit, LogitPart
from vlmattn.request import Scope


@register(
    "pai",
    paper="arXiv:2407.21771 (ECCV 2024)",
    code="github.com/LALBJ/PAI",
    faithful="golden (attention part)",
    parts="logit",
    cost="one row of the prefill, one elementwise operation per decode step",
    presets={
        "pai": ("experimental constant: alpha = .5 for LLaVA, recalled from the paper, not verified", {}),
        "pai_official": ("defaults of the released code: alpha = .2", {"alpha": 0.2}),
    },
)
@dataclass(frozen=True, kw_only=True)
class PAI(Intervention):
    """Raise the scores of image keys in the row that predicts the next token:  s' = s + alpha |s|.

    Scores are the scaled dot products before the mask. Rows edited: the last prompt row and every generated row. The
    paper's second part, classifier-free refinement of the logits (gamma = 1.1), is a decoding rule and not done here.

    Raises:
        OptionError: alpha outside 0..0.999 (from 1 on a masked key could come back in the released form).
    """

    alpha: float = option(0.5, 0, 0.999, "strength", source="paper for LLaVA (not verified); the code's default is .2")
    layers: str = option("2:", about="decoder layers", source="released code: start 2, end 32 of 32")

    def edit(self, scope: Scope) -> AttentionEdit:
        if not self.alpha:
            return AttentionEdit()
        key = ("pai", self.alpha, scope.keys, scope.device)
        lift: Tensor = scope.step.once(key, lambda: self.alpha * scope.visual.float())
        scope.count("pai", 1)
        return AttentionEdit(logit=(LogitPart(lift=lift, rows=scope.rows_that_predict()),))
