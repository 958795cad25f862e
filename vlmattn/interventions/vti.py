"""VTI: visual and textual intervention, the part in the language model (arXiv 2410.15778)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmattn.interventions.steering import ROWS, FromFile
from vlmattn.kernels import ResidualPart, Rows, Turn
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "vti",
    paper="arXiv:2410.15778 (ICLR 2025)",
    code="github.com/shengliu66/VTI (no licence; not read)",
    faithful="experimental: formula of the paper; only the directions of the language model",
    parts="residual",
    cost="one product with the directions in the MLP of each layer",
    presets={
        "vti": ("strength .9, all rows; directions that were measured for the model", {}),
        "vti_random": ("control: random directions of equal norm", {"draw": 1}),
    },
)
@dataclass(frozen=True, kw_only=True)
class VTI(FromFile):
    """Turn what the MLPs put out towards directions, with the norm kept; rows that point away turn more.

        u = x / |x| + .1 mean_i s_i d_i / |d_i|,   s_i = alpha (1 + max(0, cos(x, -d_i))),   x <- |x| u / |u|

    The paper measures directions as principal components of the differences between captions with and without
    hallucinated things (``vlmattn fit``), and also steers the vision tower, which is not built here. Counts layers.
    """

    site: ClassVar[Literal["layer", "mlp"]] = "mlp"
    rows: str = option("all", about="rows that change", choices=ROWS)
    alpha: float = option(0.9, -100, 100, "strength", source="paper: .9 for text")

    def parts(self, context: LayerContext, rows: Rows | None) -> tuple[ResidualPart, ...]:
        if not self.alpha:
            return ()
        return (Turn(rows=rows, directions=self.directions(context), strength=0.1 * self.alpha, opposed=True),)
