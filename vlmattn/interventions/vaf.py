"""VAF: visual amplification fusion (ClearSight, arXiv 2503.13107)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError
from vlmattn.interventions.base import Intervention
from vlmattn.kernels import AttentionEdit, LogitPart
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import SYSTEM, LayerContext, Weights


@register(
    "vaf",
    paper="arXiv:2503.13107 (CVPR 2025)",
    code="github.com/ustc-hyin/ClearSight",
    faithful="golden",
    parts="logit",
    cost="prefill: dense rows after the image in a fifth of the layers; decode: one multiplication per key",
    presets={"vaf": ("constants of the released script", {})},
)
@dataclass(frozen=True, kw_only=True)
class VAF(Intervention):
    """Scale up the scores of image keys and down those of the system prompt, in the middle layers.

        s'_j = enhance s_j for image keys,   s'_j = suppress s_j for keys of the system prompt

    on the scaled dot products before the mask, in text rows after an image and all generated rows. A negative score
    times ``enhance`` falls: this amplifies only what is already attended to. The system prompt is what comes before the
    first user's words (header included) if the processor is known, and before the first image otherwise: the released
    code's constant of 35 tokens is the same for LLaVA-1.5.

    ``heads`` < 1 restricts it to the share of heads whose last prompt row attends most to the image, chosen per sample
    and layer while the prompt is read. The paper speaks of visually active heads (this rule is ours); the released
    code edits all heads: so is the default. Counts attention calls edited.

    Raises:
        OptionError: ``heads`` < 1 in layers of cross-attention, where all that a head attends to is images.
    """

    acts_on = "image keys"
    turns = "used"
    enhance: float = option(1.15, 1, 10, "factor of image scores", source="released script")
    suppress: float = option(0.95, 0, 1, "factor of system prompt scores", source="released script")
    heads: float = option(1.0, 0.01, 1, "share of heads that look most at the image", source="released code: all")
    layers: str = option("9/32:15/32", about="decoder layers", source="released script: 9..14 of 32")

    def bind(self, anatomy: Anatomy) -> VAF:
        if anatomy.cross and self.heads < 1:
            raise OptionError("vaf.heads must be 1 where layers of cross-attention see nothing but images")
        super().bind(anatomy)
        return self

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return () if self.heads == 1 else self.active_layers(anatomy)

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        last = context.request.last_prompt_row(context.device) - (context.step.start or 0)
        first, stop = int(last.min()), int(last.max()) + 1
        if first < 0:  # an earlier piece of the prompt
            return
        rows = weights(first, stop)
        row = rows[torch.arange(len(last), device=context.device), :, last - first]  # [batch, heads, keys]
        mass = (row * context.visual[:, None]).sum(-1)
        count = max(1, round(self.heads * mass.shape[1]))
        chosen = torch.zeros_like(mass).scatter(1, mass.topk(count, dim=1).indices, 1.0)
        context.store(self).rows["heads"] = chosen

    def edit(self, context: LayerContext) -> AttentionEdit:
        if self.enhance == self.suppress == 1:
            return AttentionEdit()
        scale: Tensor = context.memo(("vaf", self), lambda: self._scale(context))
        chosen: Tensor | None = context.store(self).rows.get("heads")
        if chosen is not None:
            scale = 1 + chosen[:, :, None].to(context.device) * (scale - 1)[:, None]
        context.count("vaf", 1)
        return AttentionEdit(logit=(LogitPart(scale=scale, rows=context.rows_after_image()),))

    def _scale(self, context: LayerContext) -> Tensor:
        before = context.visual.cumsum(1) == 0  # the first image is still to come
        if context.request.turns_known:
            before = before & (context.roles == SYSTEM) & (context.turns.cummax(1).values < 0)
        return torch.where(context.visual, self.enhance, torch.where(before, self.suppress, 1.0))
