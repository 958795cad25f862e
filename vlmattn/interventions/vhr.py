"""VHR: vision-aware head reinforcement (arXiv 2412.13949)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.interventions.base import Intervention
from vlmattn.kernels import AttentionEdit, HeadPart
from vlmattn.options import option, parse_layers
from vlmattn.registry import register
from vlmattn.request import LayerContext, Prefill


@register(
    "vhr",
    paper="arXiv:2412.13949 (ACL 2025)",
    code="github.com/jinghan1he/VHR (not read)",
    faithful="paper text (Eq. 4, 6, 7)",
    parts="head gain",
    cost="prefill: the text tokens go through the decoder once more; decode: one multiplication",
    presets={"vhr": ("paper constants for LLaVA-1.5", {})},
)
@dataclass(frozen=True, kw_only=True)
class VHR(Intervention):
    """Scale up the heads whose output depends most on the image.

    With A_i and B_i the output of head i at the last prompt row with and without the image tokens:

        VHD_i = ||A_i - B_i||,   set to 0 where VHD_i > mean + std and ||B_i||^ta_power > mean + std over heads
        out_i <- alpha out_i  for every head with VHD_i > median        (all rows, prefill and decode)

    Heads are chosen per sample while the prompt is read, layer by layer, with the layers below already reinforced in
    both: the text tokens alone go through the decoder beside the prompt. Std is unbiased, the median is the lower one.
    Other methods of a recipe act on A, up to the head gains of the layer, and not on B. Samples without an image or
    without text stay as they are.

    The choice belongs to the prompt. A later turn on the same cache keeps the heads of the first question: the cached
    tokens have their gains in them. For a choice of its own give the whole conversation without ``past_key_values``.
    """

    acts_on = "heads"
    alpha: float = option(2.0, 0, 10, "gain of the chosen heads; 4 and more breaks the model", source="paper")
    drop_outliers: bool = option(True, about="leave out heads that change most and are loud anyway", source="paper")
    ta_power: float = option(2.0, 1, 2, "power of the norm in the outlier rule", source="paper prints the square")
    layers: str = option("1,-14:", about="decoder layers", source="paper for LLaVA-1.5-7B: the second and the last 14")

    def before_prefill(self, prefill: Prefill) -> None:
        request, visual, real = prefill.request, prefill.visual, prefill.real
        text = real & ~visual
        compared = (real & visual).any(1, keepdim=True) & text.any(1, keepdim=True)  # [batch, 1]
        width = int((text & compared).sum(1).max())
        if width == 0:
            return
        order = text.to(torch.uint8).argsort(dim=1, stable=True)[:, -width:]  # the text tokens, in order, to the right
        words = text.gather(1, order)
        layers = frozenset(parse_layers(self.layers, prefill.layers, "vhr.layers"))

        def compare(layer: int, prompt: Tensor, beside: Tensor) -> Tensor:
            last = request.of_layer(layer).last_prompt_row(prompt.device)
            seeing = prompt[torch.arange(len(prompt), device=prompt.device), last]
            found = self.gains(*told_apart(seeing.float(), beside[:, -1].float(), torch.finfo(prompt.dtype).eps))
            gain = torch.where(compared.to(found.device), found, 1.0)
            request.store(self, layer).rows["gain"] = gain
            request.ledger.add(("fired", "vhr"), (gain != 1).sum())
            return gain

        positions = (words.cumsum(1) - 1).clamp_min(0)
        prefill.beside(self, order, words, positions, layers, compare)

    def gains(self, seeing: Tensor, blind: Tensor) -> Tensor:
        """Head gains ``[batch, heads]`` from head outputs ``[batch, heads, dim]`` with and without the image."""
        vhd = (seeing - blind).norm(dim=-1)
        if self.drop_outliers:
            loud = blind.norm(dim=-1) ** self.ta_power
            vhd = torch.where(_above(vhd) & _above(loud), 0.0, vhd)
        chosen = vhd > vhd.median(-1, keepdim=True).values
        return torch.where(chosen, self.alpha, 1.0)

    def edit(self, context: LayerContext) -> AttentionEdit:
        gain: Tensor | None = context.store(self).rows.get("gain")
        if gain is None:
            return AttentionEdit()
        return AttentionEdit(head_gain=(HeadPart(gain.to(context.device)),))


def told_apart(seeing: Tensor, blind: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Both, equal in heads where they differ by rounding: a sliding window has left the image behind."""
    apart = (seeing - blind).norm(dim=-1) > 8 * rounding * blind.norm(dim=-1)
    return torch.where(apart[..., None], seeing, blind), blind


def _above(values: Tensor) -> Tensor:
    """Where a head exceeds mean + std of its layer."""
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True)
