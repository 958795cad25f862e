from dataclasses import dataclass

from vlmattn.interventions import Intervention
from vlmattn.kernels import AttentionEdit, LogitPart
from vlmattn.options import option
from vlmattn.registry import register


@register("glance", paper="none", code="none", faithful="experimental", parts="logit", cost="none",
          presets={"glance": ("looks at the image", {})})  # fmt: skip
@dataclass(frozen=True, kw_only=True)
class Glance(Intervention):
    """Raise the scores of image keys in rows that predict:  s' = s + strength |s|."""

    strength: float = option(0.9, 0, 0.99, "strength")

    def edit(self, context):
        context.count("glance", 1)
        lift = self.strength * context.visual.float()
        return AttentionEdit(logit=(LogitPart(lift=lift, rows=context.rows_that_predict()),))
