"""Recycled attention: between full steps read only what the last full step looked at (arXiv 2411.05787)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmattn.interventions.pruning.policy import HeadSlots, KVPolicy
from vlmattn.interventions.registry import Sizes, option, register
from vlmattn.kernels import AttentionEdit
from vlmattn.request import Scope, Weights


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

    With s_j the largest unedited attention that the query heads of a KV head pay to slot j in a full step, each KV head reads
    its ``keys`` best slots until the next one. The last prompt row is the first full step. The next comes after ``stride``
    steps, or with ``trigger`` "similarity" once the cosine between the present query and that of the last full step, mean
    over heads, falls below ``similar`` in a layer: one look from the host for each layer and step. Every sequence decides for
    itself.

    Nothing is freed. Only the outline of the paper was read; ``keys`` and ``stride`` are ours. Counts steps of a layer that
    read a part.

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

    def measured_layers(self, sizes: Sizes) -> tuple[int, ...]:
        return self.active_layers(sizes)

    @property
    def measures_generated(self) -> bool:
        return True

    def look(self, scope: Scope, query: Tensor, key: Tensor) -> None:
        scope.keep(self, "kv_heads", key.shape[1])
        if self.trigger == "stride" or scope.step.is_prompt:
            full = scope.step.is_prompt or (self.step(scope) + 1) % self.stride == 0
            scope.keep(self, "full", torch.full((len(query), 1), full, device=query.device))
            scope.keep(self, "any", full)
            scope.keep(self, "all", full)
        else:
            then: Tensor = scope.kept(self, "query").values.to(query.device)
            likeness = torch.cosine_similarity(query[:, :, -1].float(), then, dim=-1).mean(1, keepdim=True)
            changed = likeness < self.similar
            scope.keep(self, "full", changed)
            for name, found in zip(("any", "all"), torch.stack([changed.any(), changed.all()]).tolist(), strict=True):
                scope.keep(self, name, found)
        if self.trigger == "similarity":
            self._update(scope, "query", query[:, :, -1].float())

    def _update(self, scope: Scope, name: str, values: Tensor) -> None:
        """Keep ``[batch, heads, ...]`` of the sequences whose step is full."""
        old: HeadSlots | None = scope.find(self, name)
        if old is not None and not scope.kept(self, "all"):
            full: Tensor = scope.kept(self, "full")
            values = torch.where(full.view(-1, *(1,) * (values.ndim - 1)), values, old.values.to(values.device))
        scope.keep(self, name, HeadSlots(values))

    def measure(self, scope: Scope, weights: Weights) -> None:
        if not scope.kept(self, "any"):
            return
        row = scope.request.prompt_length - 1 - (scope.step.start or 0) if scope.step.is_prompt else scope.queries - 1
        heads: int = scope.kept(self, "kv_heads")
        per_head = weights(row, row + 1)[:, :, 0, : scope.keys]
        seen = per_head.view(len(per_head), heads, -1, scope.keys).amax(2)
        if scope.keys < self.keys:
            seen = pad(seen, (0, self.keys - scope.keys))
        found = seen.topk(self.keys, dim=-1)
        self._update(scope, "next", torch.where(found.values > 0, found.indices, -1))
        self._update(scope, "held", torch.full((len(seen), 1), scope.keys, device=seen.device))
        if scope.kept(self, "all"):
            scope.keep(self, "since", scope.keys)

    def edit(self, scope: Scope) -> AttentionEdit:
        self.step(scope, advance=True)
        if scope.kept(self, "all"):
            return AttentionEdit()
        chosen, held = (scope.kept(self, name).values.to(scope.device) for name in ("next", "held"))
        slots = torch.arange(scope.keys, device=scope.device)
        new = slots[scope.kept(self, "since") :]
        new = torch.where(new >= held, new, -1)
        read = torch.cat([chosen, new[:, None].expand(-1, chosen.shape[1], -1)], -1)
        scope.count("recycled", 1)
        if not scope.kept(self, "any"):
            return AttentionEdit(read=read)
        width = max(scope.keys, read.shape[-1])
        whole, read = pad(slots, (0, width - scope.keys), value=-1), pad(read, (0, width - read.shape[-1]), value=-1)
        full: Tensor = scope.kept(self, "full")
        return AttentionEdit(read=torch.where(full[..., None], whole, read))
