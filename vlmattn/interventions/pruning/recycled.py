"""Recycled attention: between full steps read only what the last full step looked at (arXiv 2411.05787)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmattn.anatomy import Anatomy
from vlmattn.interventions.base import last_row
from vlmattn.interventions.pruning.policy import KVPolicy
from vlmattn.kernels import AttentionEdit
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext, Store, Weights


@register(
    "recycled",
    paper="arXiv:2411.05787",
    code="github.com/carriex/recycled-attention",
    faithful="experimental",
    parts="read",
    cost="decode: most steps read few keys; all are held. Full steps look at the attention of one row once more",
    presets={
        "recycled": ("256 keys, a full step every 8", {}),
        "recycled_similar": ("a full step where the query has changed", {"trigger": "similarity"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class RecycledAttention(KVPolicy):
    """Read the ``keys`` slots that the last full step attended to most, and what came after it.

    With s_j the largest unedited attention that the query heads of a KV head pay to slot j in a full step, each KV head
    reads its ``keys`` best slots until the next one. The last prompt row is the first full step. The next comes after
    ``stride`` steps, or with ``trigger`` "similarity" once the cosine between the present query and that of the last
    full step, mean over heads, falls below ``similar`` in a layer: one look from the host for each layer and step.
    Every sequence decides for itself.

    Nothing is freed. Only the outline of the paper was read; ``keys`` and ``stride`` are ours. Counts steps of a layer
    that read a part.

    Raises:
        UnsupportedError: a static cache, no cache.
    """

    needs_images: ClassVar[bool] = False
    shrinks: ClassVar[bool] = False
    keys: int = option(256, 1, 10**6, "slots that a KV head reads, besides new ones", source="ours")
    stride: int = option(8, 1, 10**6, "steps from one full step to the next", source="ours")
    trigger: str = option("stride", about="what brings a full step", choices=("stride", "similarity"))
    similar: float = option(0.8, -1, 1, "cosine of queries below which a step is full", source="ours")

    def cached(self, layer: int, images: int, text: int, kv_heads: int) -> tuple[float, float] | None:
        held = images + text
        return (
            None
            if self.trigger == "similarity"
            else (held, ((self.stride - 1) * min(self.keys, held) + held) / self.stride)
        )

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return self.active_layers(anatomy)

    @property
    def follows_attention(self) -> bool:
        return True

    def on_queries_keys(self, context: LayerContext, query: Tensor, key: Tensor) -> None:
        self.refuse_cropped(context)
        kept = context.store(self)
        if self.trigger == "stride" or context.step.is_prompt:
            full = self.generated(context) % self.stride == 0
            changed, some, every = torch.full((len(query), 1), full, device=query.device), full, full
        else:
            then = kept.rows["query"].to(query.device)
            likeness = torch.cosine_similarity(query[:, :, -1].float(), then, dim=-1).mean(1, keepdim=True)
            changed = likeness < self.similar
            some, every = torch.stack([changed.any(), changed.all()]).tolist()
        kept.rows["full"] = changed
        kept.shared |= {"kv_heads": key.shape[1], "any": some, "all": every}
        if self.trigger == "similarity":
            self._update(kept, "query", query[:, :, -1].float())

    def _update(self, kept: Store, name: str, values: Tensor) -> None:
        """Keep ``[batch, heads, ...]`` of the sequences whose step is full."""
        if name in kept.rows and not kept.shared["all"]:
            full = kept.rows["full"].view(-1, *(1,) * (values.ndim - 1))
            values = torch.where(full, values, kept.rows[name].to(values.device))
        kept.rows[name] = values

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        kept = context.store(self)
        if not kept.shared["any"]:
            return
        self.advance(context)
        per_head = last_row(context, weights)
        seen = per_head.view(len(per_head), kept.shared["kv_heads"], -1, context.keys).amax(2)
        if context.keys < self.keys:
            seen = pad(seen, (0, self.keys - context.keys))
        found = seen.topk(self.keys, dim=-1)
        self._update(kept, "next", torch.where(found.values > 0, found.indices, -1))
        self._update(kept, "held", torch.full((len(seen), 1), context.keys, device=seen.device))
        if kept.shared["all"]:
            kept.shared["since"] = context.keys

    def edit(self, context: LayerContext) -> AttentionEdit:
        kept = context.store(self)
        if kept.shared["all"]:
            return AttentionEdit()
        chosen, held = (kept.rows[name].to(context.device) for name in ("next", "held"))
        slots = torch.arange(context.keys, device=context.device)
        new = slots[kept.shared["since"] :]
        new = torch.where(new >= held, new, -1)
        read = torch.cat([chosen, new[:, None].expand(-1, chosen.shape[1], -1)], -1)
        context.count("recycled", 1)
        if not kept.shared["any"]:
            return AttentionEdit(read=read)
        width = max(context.keys, read.shape[-1])
        whole, read = pad(slots, (0, width - context.keys), value=-1), pad(read, (0, width - read.shape[-1]), value=-1)
        return AttentionEdit(read=torch.where(kept.rows["full"][..., None], whole, read))
