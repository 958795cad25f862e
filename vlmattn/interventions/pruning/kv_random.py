"""Slots at random: what a policy about the cache has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.interventions.pruning.budget import BudgetPolicy, numbers
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "kv_random",
    paper="none",
    code="none",
    faithful="control",
    parts="keep",
    cost="decode: few tokens are held, and read",
    presets={"kv_random": ("control: half of the prompt's tokens at random", {})},
)
@dataclass(frozen=True, kw_only=True)
class KVRandom(BudgetPolicy):
    """Hold round(keep_ratio n) of a prompt's n tokens, drawn evenly in each layer; what is generated stays.

    The draw depends on ``seed``, the layer and the number of a token in its sequence. Counts evicted slots.

    Raises:
        UnsupportedError: a static cache, no cache.
    """

    seed: int = option(0, 0, 2**31 - 1, "of the draw")

    def scores(self, context: LayerContext, held: list[int]) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed * 1000 + context.layer)
        table = torch.rand(context.keys + 1, generator=draw).to(context.device)
        return table[numbers(context)][:, None]
