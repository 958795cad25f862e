"""Steering: a measured direction is added to hidden states (activation addition, arXiv 2308.10248)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.interventions.steering import FromFile
from vlmattn.kernels import Add, ResidualPart, Rows
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "steer",
    paper="arXiv:2308.10248 (activation addition)",
    faithful="formula",
    parts="residual",
    cost="one addition to the rows of the layers in the file",
    presets={
        "steer": ("directions that were measured for the model, added to the last prompt row and the answer", {}),
        "steer_random": ("control: random directions of equal norm", {"draw": 1}),
    },
)
@dataclass(frozen=True, kw_only=True)
class Steer(FromFile):
    """Add a direction to hidden states, the plain baseline of this kind.

        x <- x + alpha d_l     of what layer l puts out

    with d_l the first direction of the layer as it was measured, not normalised. Counts layers.
    """

    alpha: float = option(1.0, -1000, 1000, "strength")

    def parts(self, context: LayerContext, rows: Rows | None) -> tuple[ResidualPart, ...]:
        if not self.alpha:
            return ()
        return (Add(rows=rows, vector=self.alpha * self.directions(context)[0]),)
