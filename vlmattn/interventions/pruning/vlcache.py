"""VL-Cache: budgets by how sparse a layer's attention is, scores from the rows behind the images (arXiv 2410.23317)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmattn.interventions.pruning.budget import AttentionBudget, above, few_rows, newest, real_slots
from vlmattn.interventions.pruning.policy import host_counts
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import Eviction, LayerContext, Weights


@register(
    "vlcache",
    paper="arXiv:2410.23317 (ICLR 2025)",
    code="not read",
    faithful="experimental (paper, recalled)",
    parts="keep",
    cost="prefill: the rows behind the images are looked at once more; decode: few tokens are held",
    presets={"vlcache": ("half of the prompt's tokens over all layers; layers with wide attention hold more", {})},
)
@dataclass(frozen=True, kw_only=True)
class VLCache(AttentionBudget):
    """Hold the tokens that text behind the images attends to, and more of them in layers that look at many.

    With A the unedited attention of the rows W behind the last image (all, where there is none), and w_i the number of
    slots that row i may see:

        d_l = mean over heads and i in W of #{j: A_ij >= p max_j A_ij} / w_i      how dense layer l is
        K_l = keep_ratio n L d_l / sum_l d_l, at least ``least`` n, at most n     what it holds of n tokens, L layers
        s_j = mean over the query heads of a KV head of sum_{i in W} A_ij

    The last ``recent`` K_l tokens and the slots with the highest s stay; what is generated stays. All densities are
    known once the prompt is read, so slots go after the first step, which reads them all. Counts evicted slots (of each
    KV head).

    Raises:
        OptionError: attention edits in the same layers.
        UnsupportedError: a static cache, no cache.
    """

    by_head: ClassVar[bool] = True
    p: float = option(0.01, 0, 1, "part of a row's maximum that counts as attention", source="paper, recalled: 1 %")
    least: float = option(0.01, 0, 1, "least share that a layer holds", source="paper, recalled")
    recent: float = option(0.1, 0, 1, "share of the held tokens, the most recent", source="paper, recalled: 10 %")

    def cached(self, layer: int, images: int, text: int, kv_heads: int) -> None:
        return None

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        sees, behind = real_slots(context).cumsum(1), context.visual.flip(1).cumsum(1).flip(1) == 0
        found = []
        for part, rows, slots in few_rows(context, weights, asking=behind):
            many = (part >= self.p * part.amax(-1, keepdim=True)) & (part > 0)
            share = (many.sum(-1).float().mean(1) / sees[:, slots].clamp_min(1)).masked_fill(~rows, 0).sum(1)
            found.append((part.masked_fill(~rows[:, None, :, None], 0).sum(2), share, rows.sum(1)))
        paid, dense, count = (torch.stack(values).sum(0) for values in zip(*found, strict=True))
        context.store(self).rows["seen"] = self.by_kv_head(context, paid)
        context.request.store(self).rows[f"density {context.layer}"] = dense / count.clamp_min(1)

    def _shares(self, context: LayerContext) -> list[float]:
        """d_l L / sum d of each sequence."""
        kept = context.request.store(self).rows
        table = torch.stack([found.to(context.device) for found in kept.values()])
        own = kept[f"density {context.layer}"].to(context.device)
        shares: list[float] = (own * len(table) / table.sum(0).clamp_min(1e-9)).tolist()
        return shares

    def evict(self, context: LayerContext) -> Eviction | None:
        kept = context.store(self)
        if context.step.is_prompt:
            there = [sum(pair) for pair in zip(*host_counts(context.request, context.keys), strict=True)]
            kept.rows["there"] = there
            return None
        if "seen" not in kept.rows or context.queries > 1:
            return None
        new, there = self.generated(context), kept.rows["there"]
        gone = kept.rows.get("gone", [0] * len(there))  # after earlier turns
        whole = [n + lost for n, lost in zip(there, gone, strict=True)]
        held = [
            min(max(round(self.keep_ratio * n * part), round(self.least * n), 1), left)
            for n, part, left in zip(whole, self._shares(context), there, strict=True)
        ]
        kept.rows["gone"] = [n - stay for n, stay in zip(whole, held, strict=True)]
        kept.shared["recent"] = [round(self.recent * n) + new for n in held]
        return self._hold(context, [n + new for n in held])

    def scores(self, context: LayerContext, held: list[int]) -> Tensor:
        kept = context.store(self)
        seen: Tensor = kept.rows.pop("seen")
        last = torch.tensor(kept.shared.pop("recent"), device=context.device)[:, None]
        return above(pad(seen, (0, context.keys - seen.shape[-1])), newest(context, last))
