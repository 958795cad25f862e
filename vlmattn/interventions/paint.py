"""PAINT: paying attention to informed tokens (arXiv 2501.12206)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.interventions.base import Intervention, check_tower
from vlmattn.kernels import AttentionEdit, LogitPart
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import ImageFeatures, LayerContext


@register(
    "paint",
    paper="arXiv:2501.12206",
    code="github.com/hasanar1f/PAINT",
    faithful="golden (with CLIP towers)",
    parts="logit",
    cost="one query row in two layers of the vision tower, one of the prefill; decode: one elementwise operation",
    presets={"paint": ("defaults of the released CHAIR script", {})},
)
@dataclass(frozen=True, kw_only=True)
class PAINT(Intervention):
    """Raise the scores of the image tokens that the vision tower itself finds important.

    With c_l the attention of the tower's CLS token to the patches in layer l, summed over heads, and N patches:

        SUM = the patches with c_{-2} > Q3 + 1.5 (Q3 - Q1)  (quartiles over the image)
        LOC = the floor(local N) patches with the largest c_0, without those in SUM
        s'_j = s_j + alpha |s_j| in LOC,   s_j + beta |s_j| in SUM

    on the scaled dot products before the mask, in the row that predicts the next token. Towers without a CLS token
    (SigLIP, Qwen) use the attention of the mean query instead (ours, experimental). The paper speaks of learned
    margins; the released code has fixed alpha and beta. Counts image tokens raised.

    Raises:
        OptionError: an option out of range.
        InputError: image features were given instead of pixels.
    """

    alpha: float = option(0.7, 0, 0.999, "strength on local tokens", source="released CHAIR script")
    beta: float = option(0.3, 0, 0.999, "strength on summary tokens", source="released CHAIR script")
    local: float = option(0.25, 0, 1, "share of patches that are local tokens", source="released code")
    layers: str = option("2:", about="decoder layers", source="released code: start 2, end 32 of 32")

    def tower_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        check_tower("paint", anatomy)
        return (0, anatomy.tower_layers - 2)

    def on_image_features(self, features: ImageFeatures) -> None:
        first, late = min(features.patches), max(features.patches)
        lifts = []
        for local, summary in zip(features.patches[first], features.patches[late], strict=True):
            is_local, is_summary = self.select(local.sum(0), summary.sum(0))
            lifts.append(self.alpha * is_local.float() + self.beta * is_summary.float())
        lift = features.place(lifts)
        features.request.ledger.add(("fired", "paint"), (lift > 0).sum())
        features.request.store(self).by_slot("lift", 0, torch.float32).write(features.start, lift)

    def select(self, local: Tensor, summary: Tensor) -> tuple[Tensor, Tensor]:
        """LOC and SUM, bool ``[tokens]``, from the CLS attention of the first and the last but one layer."""
        low, high = summary.quantile(torch.tensor([0.25, 0.75], dtype=summary.dtype, device=summary.device))
        is_summary = summary > high + 1.5 * (high - low)
        is_local = torch.zeros_like(is_summary)
        is_local[local.topk(int(self.local * len(local))).indices] = True
        return is_local & ~is_summary, is_summary

    def edit(self, context: LayerContext) -> AttentionEdit:
        kept = context.request.store(self).slots.get("lift")
        if kept is None or not (self.alpha or self.beta):
            return AttentionEdit()
        lift: Tensor = context.memo(("paint", self), lambda: context.request.read(kept, context.keys, context.device))
        return AttentionEdit(logit=(LogitPart(lift=lift, rows=context.rows_that_predict()),))
