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
    faithful="paper text (a summary of it), sizes are ours",
    parts="read",
    cost="decode: most steps read few keys; all are held. Full steps look at the attention of one row once more",
    presets={
        "recycled": ("256 keys, a full step every 8", {}),
        "recycled_similar": ("a full step where the query has changed, looked at every 5", {"trigger": "similarity"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class RecycledAttention(KVPolicy):
    """Read the ``keys`` slots that the last full step attended to most, and take new ones in for the worst of them.

    With s_j the largest unedited attention that the query heads of a KV head pay to slot j in a full step, each KV head
    reads its ``keys`` best slots in the next step, and the newest token. Of these ``keys`` + 1 the one with the lowest
    attention of that step goes, so that the set keeps its size, until the next full step chooses among all. The last
    prompt row is the first full step. The next comes after ``stride`` steps, or with ``trigger`` "similarity" once the
    cosine between the present query and that of the last full step, mean over heads, is below ``similar`` in a layer:
    every ``check`` steps this is looked at, one look from the host for each layer. Every sequence decides for itself.

    Nothing is freed. Attention among the slots read is told from queries and keys over sqrt(dim); that a KV head takes
    the largest of its query heads is ours, and so are small ``keys`` and ``stride``: the paper's are 4096 and 50 on
    RULER, 2048 and 10 for language modelling. Counts steps of a layer that read a part.

    Raises:
        UnsupportedError: a static cache, no cache.
    """

    needs_images: ClassVar[bool] = False
    shrinks: ClassVar[bool] = False
    keys: int = option(256, 1, 10**6, "slots that a KV head reads, and the newest", source="ours; paper: 2048, 4096")
    stride: int = option(8, 1, 10**6, "steps from one full step to the next", source="ours; paper: 10, 50")
    trigger: str = option("stride", about="what brings a full step", choices=("stride", "similarity"))
    similar: float = option(0.8, -1, 1, "cosine of queries below which a step is full", source="paper: .8")
    check: int = option(5, 1, 10**6, "steps from one look at the cosine to the next", source="paper: 5")

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
        self.advance(context)
        kept, count = context.store(self), self.generated(context)
        if self.trigger == "stride" or context.step.is_prompt or count % self.check:
            full = context.step.is_prompt or (self.trigger == "stride" and count % self.stride == 0)
            changed, some, every = torch.full((len(query), 1), full, device=query.device), full, full
        else:
            then = kept.rows["query"].to(query.device)
            likeness = torch.cosine_similarity(query[:, :, -1].float(), then, dim=-1).mean(1, keepdim=True)
            changed = likeness < self.similar
            some, every = torch.stack([changed.any(), changed.all()]).tolist()
        kept.rows["full"] = changed
        kept.shared |= {"kv_heads": key.shape[1], "any": some, "all": every}
        if self.trigger == "similarity" and some:
            self._update(kept, "query", query[:, :, -1].float())
        if not every:
            self._recycle(kept, query[:, :, -1], key, context.keys)

    @staticmethod
    def _recycle(kept: Store, query: Tensor, key: Tensor, keys: int) -> None:
        """What this step reads, and what of that the next one does: without the slot of the lowest attention."""
        chosen = kept.rows["next"].to(query.device)
        kept.rows["read"] = read = pad(chosen, (0, 1), value=keys - 1)
        packed = query.unflatten(1, (key.shape[1], -1)).float()  # type: ignore[no-untyped-call]
        found = key.gather(2, read.clamp_min(0)[..., None].expand(-1, -1, -1, key.shape[-1])).float()
        scores = packed @ found.transpose(-1, -2) / query.shape[-1] ** 0.5
        seen = scores.masked_fill(read[:, :, None] < 0, float("-inf")).softmax(-1).amax(2)
        worst = seen.masked_fill(read < 0, -1.0).argmin(-1, keepdim=True)
        places = torch.arange(chosen.shape[-1], device=query.device).expand_as(chosen)
        kept.rows["next"] = read.gather(-1, places + (places >= worst))

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
        per_head = last_row(context, weights)
        seen = per_head.view(len(per_head), kept.shared["kv_heads"], -1, context.keys).amax(2)
        if context.keys < self.keys:
            seen = pad(seen, (0, self.keys - context.keys))
        found = seen.topk(self.keys, dim=-1)
        self._update(kept, "next", torch.where(found.values > 0, found.indices, -1))

    def edit(self, context: LayerContext) -> AttentionEdit:
        kept = context.store(self)
        if kept.shared["all"]:
            return AttentionEdit()
        read = kept.rows["read"].to(context.device)
        context.count("recycled", 1)
        if not kept.shared["any"]:
            return AttentionEdit(read=read)
        slots, width = torch.arange(context.keys, device=context.device), max(context.keys, read.shape[-1])
        whole, read = pad(slots, (0, width - context.keys), value=-1), pad(read, (0, width - read.shape[-1]), value=-1)
        return AttentionEdit(read=torch.where(kept.rows["full"][..., None], whole, read))
