"""VISTA: hidden states turn towards what the image changes in the last prompt row (arXiv 2502.03628)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmattn.interventions.steering import ROWS, Steering, drawn
from vlmattn.kernels import ResidualPart, Rows, Turn
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext, Prefill


@register(
    "vista",
    paper="arXiv:2502.03628 (ICML 2025)",
    code="github.com/LzVv123456/VISTA (MIT)",
    faithful="golden (the steering layer); vectors of the prompt by its formula; its logit mix is `sla`",
    parts="residual",
    cost="prefill: the prompt is read twice more; decode: one product in the MLP of each layer",
    presets={
        "vista": ("released strength .1, all layers and rows", {}),
        "vista_random": ("control: random directions", {"draw": 1}),
    },
)
@dataclass(frozen=True, kw_only=True)
class VISTA(Steering):
    """Turn what the MLPs put out towards what the image adds, with the norm kept; rows that point away turn more.

    With h_l(p) what layer l puts out in the last row of a prompt p, and p' the prompt without its image tokens:

        v_l = h_l(p) - h_l(p'),   u = x / |x| + alpha (1 + max(0, cos(x, -v_l))) v_l / |v_l|,   x <- |x| u / |u|

    measured before the prompt is read, by the bare model. (The release adds a unit to one number of v_0, which an SVD
    of zeros gives.) ``draw`` other than 0 puts random directions in the place of v: the control; it names the seed.
    Counts layers.
    """

    site: ClassVar[Literal["layer", "mlp"]] = "mlp"
    needs_images: ClassVar[bool] = True
    rows: str = option("all", about="rows that change", source="released: all", choices=ROWS)
    alpha: float = option(0.1, -100, 100, "strength", source="released default")
    draw: int = option(0, 0, 2**31 - 1, "seed of random directions in their place; 0 = those of the image")

    def before_prefill(self, prefill: Prefill) -> None:
        if not self.alpha:
            return
        request, kept = prefill.request, dict[int, list[Tensor]]()

        def keep(layer: int, hidden: Tensor) -> None:
            last = request.last_prompt_row(hidden.device)
            kept.setdefault(layer, []).append(hidden[torch.arange(len(hidden), device=hidden.device), last].float())

        prefill.states(keep)
        prefill.states(keep, prefill.visual & prefill.real)
        for layer, (seeing, blind) in kept.items():
            vector = seeing - blind
            if self.draw:
                vector = drawn(vector.shape[1:], self.draw, layer).to(vector).expand_as(vector)
            request.store(self, layer).rows["vector"] = vector

    def parts(self, context: LayerContext, rows: Rows | None) -> tuple[ResidualPart, ...]:
        vector: Tensor | None = context.store(self).rows.get("vector")
        if vector is None:
            return ()
        directions = vector.to(context.device)[:, None]
        return (Turn(rows=rows, directions=directions, strength=self.alpha, opposed=True),)
