"""VHR: vision-aware head reinforcement (arXiv 2412.13949)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.interventions.base import Intervention
from vlmattn.interventions.registry import option, parse_layers, register
from vlmattn.kernels import AttentionEdit, HeadPart
from vlmattn.request import Preparation, Scope, Weights


@register(
    "vhr",
    paper="arXiv:2412.13949 (ACL 2025)",
    code="not available",
    faithful="paper text",
    parts="head gain",
    cost="prefill: one more decoder pass over twice the batch; decode: one multiplication",
    presets={"vhr": ("paper constants for LLaVA-1.5", {})},
)
@dataclass(frozen=True, kw_only=True)
class VHR(Intervention):
    """Scale up the heads whose output depends most on the image.

    With A_i and B_i the output of head i at the last prompt row with and without the image tokens:

        VHD_i = ||A_i - B_i||,   set to 0 where VHD_i > mean + std and ||B_i||^ta_power > mean + std over heads
        out_i <- alpha out_i  for every head with VHD_i > median        (all rows, prefill and decode)

    Heads are chosen per sample before the prompt is read, layer by layer, in a pass over both versions of the prompt
    in which the layers below are already reinforced in both. Std is unbiased, the median is the lower one. In that
    pass other methods of a recipe do not act.
    """

    alpha: float = option(2.0, 0, 10, "gain of the chosen heads; 4 and more breaks the model", source="paper")
    drop_outliers: bool = option(
        True, about="leave out heads that change most and are loud without the image", source="paper"
    )
    ta_power: float = option(2.0, 1, 2, "power of the norm in the outlier rule", source="paper prints the square")
    layers: str = option("1,-14:", about="decoder layers", source="paper for LLaVA-1.5-7B: the second and the last 14")

    def prepare(self, preparation: Preparation) -> None:
        request, real, visual = preparation.request, preparation.real, preparation.visual
        batch, length = real.shape
        device = preparation.embeds.device
        text = real & ~visual
        with_image = (real & visual).any(1, keepdim=True)  # without one both streams differ by rounding only
        order = text.to(torch.uint8).argsort(dim=1, stable=True)  # the text tokens move to the right end, in order
        without = preparation.embeds.gather(1, order[..., None].expand_as(preparation.embeds))
        slots = torch.arange(length, device=device).expand(batch, length)
        positions = slots if preparation.positions is None else preparation.positions
        bare = slots.expand_as(positions)
        rows = torch.cat([request.last_prompt_row(device), slots[:, -1]])
        active = set(parse_layers(self.layers, preparation.layers, "vhr.layers"))

        def watch(layer: int, out: Tensor, weights: Weights) -> Tensor | None:
            if layer not in active:
                return None
            last = out[torch.arange(2 * batch, device=out.device), rows.to(out.device)].float()  # [2 batch, heads, dim]
            gain = torch.where(with_image.to(out.device), self.gains(last[:batch], last[batch:]), 1.0)
            request.state[(self, layer, "gain")] = gain
            request.ledger.add(("fired", "vhr"), (gain != 1).sum())
            return gain.repeat(2, 1)

        preparation.run(
            torch.cat([preparation.embeds, without]),
            torch.cat([real, text.gather(1, order)]),
            torch.cat([positions, bare], dim=-2),
            watch,
        )

    def gains(self, seeing: Tensor, blind: Tensor) -> Tensor:
        """Head gains ``[batch, heads]`` from head outputs ``[batch, heads, dim]`` with and without the image."""
        vhd = (seeing - blind).norm(dim=-1)
        if self.drop_outliers:
            loud = blind.norm(dim=-1) ** self.ta_power
            vhd = torch.where(_above(vhd) & _above(loud), 0.0, vhd)
        chosen = vhd > vhd.median(-1, keepdim=True).values
        return torch.where(chosen, self.alpha, 1.0)

    def edit(self, scope: Scope) -> AttentionEdit:
        gain: Tensor | None = scope.find(self, "gain")
        if gain is None:
            return AttentionEdit()
        return AttentionEdit(head_gain=(HeadPart(gain.to(scope.device)),))


def _above(values: Tensor) -> Tensor:
    """Where a head exceeds mean + std of its layer."""
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True)
