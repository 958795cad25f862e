"""LongHeads: every head reads the tiles of the image that its query is most like (arXiv 2402.10685)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.interventions.pruning.policy import KVPolicy, host_counts, image_tokens, slots_of
from vlmattn.kernels import AttentionEdit
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "longheads",
    paper="arXiv:2402.10685",
    code="github.com/LuLuLuyi/LongHeads",
    faithful="experimental",
    parts="read",
    cost="decode: each head reads a few tiles; all are held. Prompt: one vector for each tile and head",
    presets={"longheads": ("tiles of 64 image tokens, every head reads a quarter of them", {})},
)
@dataclass(frozen=True, kw_only=True)
class LongHeads(KVPolicy):
    """Let each KV head read text, the first and the last tile of the images, and the tiles nearest to its query.

    The image tokens of a sequence fall into tiles of ``tile`` (never across images). With K_c the keys of tile c and u
    the mean key of the tile, a tile is represented by

        r_c = sum_j softmax_j(u . K_cj / sqrt(dim)) K_cj

    In every step a KV head scores tiles by the largest q . r_c of its query heads and reads the round(keep n) best of n
    tiles, the first and the last among them. What was generated is read in full.

    Chunks of text became tiles of images, keys keep their positions, and the query of the representation is the mean
    key: ours; only the outline of the paper was read. Counts steps of a layer.

    Raises:
        UnsupportedError: a static cache, no cache.
    """

    shrinks: ClassVar[bool] = False
    tile: int = option(64, 1, 10**6, "image tokens of a tile", source="ours")
    keep: float = option(0.25, 0, 1, "share of the tiles that a head reads", source="ours")

    def at(self, share: float) -> LongHeads:
        return replace(self, keep=share)

    def cached(self, layer: int, images: int, text: int, kv_heads: int) -> tuple[float, float]:
        """As if the image tokens were one image."""
        tiles = math.ceil(images / self.tile)
        read = min(max(round(self.keep * tiles), 2), tiles) * self.tile
        return images + text, min(read, images) + text

    def on_queries_keys(self, context: LayerContext, query: Tensor, key: Tensor) -> None:
        kept = context.store(self)
        if context.step.is_prompt:
            tiles = self._tiles(context)
            kept.rows |= {"tiles": tiles, "centres": _centres(key[:, :, : context.keys], tiles)}
            kept.shared["most words"] = max(host_counts(context.request, context.keys)[1]) - context.keys
            return
        packed = query[:, :, -1].reshape(len(query), key.shape[1], -1, query.shape[-1]).float()
        scores = (packed @ kept.rows["centres"].transpose(-1, -2)).amax(2)
        kept.rows["read"] = self._nearest(scores, kept.rows["tiles"])

    def _nearest(self, scores: Tensor, tiles: Tensor) -> Tensor:
        """Slots ``[batch, kv_heads, n]`` to read, -1 for none, from scores ``[batch, kv_heads, tiles]``."""
        exists = (tiles >= 0).any(-1)  # the first ones of each sequence
        count = exists.sum(1, keepdim=True)
        number = torch.arange(tiles.shape[1], device=tiles.device)
        ends = (number == 0) | (number == count - 1)
        scores = scores.masked_fill((ends & exists)[:, None], float("inf")).masked_fill(~exists[:, None], float("-inf"))
        most = min(max(math.ceil(self.keep * tiles.shape[1]), 2), tiles.shape[1])
        wanted = (self.keep * count).round().long().clamp_min(2).minimum(count)
        best = scores.topk(most, dim=-1).indices[..., None].expand(-1, -1, -1, tiles.shape[-1])
        chosen = tiles[:, None].expand(-1, scores.shape[1], -1, -1).gather(2, best)
        return torch.where((number[:most] < wanted)[:, None, :, None], chosen, -1).flatten(2)

    def _tiles(self, context: LayerContext) -> Tensor:
        """Slots of each tile, int64 ``[batch, tiles, tile]``, -1 where a tile is shorter or there is none."""
        visual, number = image_tokens(context), context.images.long()
        within = (visual.cumsum(1) - 1).clamp_min(0)
        starts = visual & (number != torch.nn.functional.pad(number, (1, 0), value=-2)[:, :-1])
        first = torch.where(starts, within, 0).cummax(1).values
        place = within - first
        opens = visual & (place % self.tile == 0)
        index = (opens.cumsum(1) - 1).clamp_min(0)
        count = int(opens.sum(1).max())  # one look per prompt and layer
        slots = torch.arange(context.keys, device=context.device).expand_as(index)
        flat = torch.full((len(index), max(count, 1) * self.tile + 1), -1, device=context.device)
        where = torch.where(visual, index * self.tile + place % self.tile, flat.shape[1] - 1)
        flat.scatter_(1, where, slots)
        return flat[:, :-1].view(len(index), max(count, 1), self.tile)

    def edit(self, context: LayerContext) -> AttentionEdit:
        if context.step.is_prompt:
            return AttentionEdit()
        kept = context.store(self)
        chosen: Tensor = kept.rows["read"]
        text = ~context.visual if context.real is None else ~context.visual & context.real
        words = slots_of(text, kept.shared["most words"] + context.keys)
        context.count("longheads", 1)
        return AttentionEdit(read=torch.cat([words.expand(-1, chosen.shape[1], -1), chosen], -1))


def _centres(key: Tensor, tiles: Tensor) -> Tensor:
    """r_c, float32 ``[batch, kv_heads, tiles, dim]``, from keys ``[batch, kv_heads, key, dim]``."""
    batch, kv_heads, _, dim = key.shape
    _, count, size = tiles.shape
    where = tiles.clamp_min(0).view(batch, 1, -1, 1).expand(-1, kv_heads, -1, dim)
    keys = key.gather(2, where).view(batch, kv_heads, count, size, dim).float()
    there = (tiles >= 0)[:, None, :, :, None]
    mean = (keys * there).sum(3) / there.sum(3).clamp_min(1)
    scores = (keys @ mean[..., None])[..., 0] / dim**0.5
    share = scores.masked_fill(~there[..., 0], float("-inf")).softmax(-1).nan_to_num()
    centres: Tensor = (share[..., None] * keys).sum(3)
    return centres
