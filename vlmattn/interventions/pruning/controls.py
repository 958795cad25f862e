"""Controls: what a method that chooses tokens with care has to beat (arXiv 2511.02650, 2510.07143, 2502.11501)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmattn.interventions.pruning import choices
from vlmattn.interventions.pruning.early import EarlyPruning, Tokens, images_of
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import KeptTokens, PruningStage

_COST = "all layers run on the rest, from the first on; the vision tower is as it was. Decode: fewer keys"
_PAPER = "arXiv:2511.02650, 2510.07143"


def _control(name: str, kept: str) -> dict[str, tuple[str, dict[str, Any]]]:
    return {name: (f"control: {kept}, before the first layer; a quarter stays", {})}


@register(
    "random",
    paper=_PAPER,
    faithful="control",
    parts="keep",
    cost=_COST,
    presets=_control("random", "tokens of each image drawn at random"),
)
@dataclass(frozen=True, kw_only=True)
class RandomTokens(EarlyPruning):
    """Keep round(keep_ratio n) of the n tokens of each image by lot.

    The lot depends on ``seed`` and n only, so a prompt keeps the same tokens in any batch, and images of one size keep
    the same places. Measure several seeds.
    """

    seed: int = option(0, 0, 2**31, "of the lot")

    def pick(self, tokens: Tokens, count: int) -> Tensor:
        images, n, _ = tokens.embeddings.shape
        lot = torch.rand(n, generator=torch.Generator().manual_seed(self.seed))  # the same on every device
        return choices.top(lot.to(tokens.embeddings.device).expand(images, -1), count)


@register(
    "grid",
    paper=_PAPER,
    faithful="control",
    parts="keep",
    cost=_COST,
    presets=_control("grid", "tokens spread evenly over each image"),
)
@dataclass(frozen=True, kw_only=True)
class GridTokens(EarlyPruning):
    """Keep round(keep_ratio n) of the n tokens of each image, spread evenly.

    Over the picture, if n is a square number, else along the sequence of tokens.
    """

    def pick(self, tokens: Tokens, count: int) -> Tensor:
        images, n, _ = tokens.embeddings.shape
        return choices.grid(n, count, tokens.embeddings.device).expand(images, -1)


@register(
    "first",
    paper=_PAPER,
    faithful="control",
    parts="keep",
    cost=_COST,
    presets=_control("first", "the top of each image"),
)
@dataclass(frozen=True, kw_only=True)
class FirstTokens(EarlyPruning):
    """Keep the first round(keep_ratio n) of the n tokens of each image: the top of the picture."""

    def pick(self, tokens: Tokens, count: int) -> Tensor:
        images, n, _ = tokens.embeddings.shape
        return (torch.arange(n, device=tokens.embeddings.device) < count).expand(images, -1)


@register(
    "last",
    paper=_PAPER,
    faithful="control",
    parts="keep",
    cost=_COST,
    presets=_control("last", "the bottom of each image"),
)
@dataclass(frozen=True, kw_only=True)
class LastTokens(EarlyPruning):
    """Keep the last round(keep_ratio n) of the n tokens of each image: the bottom, nearest to the question."""

    def pick(self, tokens: Tokens, count: int) -> Tensor:
        images, n, _ = tokens.embeddings.shape
        return (torch.arange(n, device=tokens.embeddings.device) >= n - count).expand(images, -1)


@register(
    "pool",
    paper=_PAPER,
    faithful="control",
    parts="keep",
    cost=_COST,
    presets=_control("pool", "neighbouring tokens of each image averaged"),
)
@dataclass(frozen=True, kw_only=True)
class PooledTokens(GridTokens):
    """Average neighbours: the places of ``grid`` stay, each as the mean of the tokens that are nearest to it.

    Not where image features come in after the first layers (DeepStack), which belong to single tokens.

    Raises:
        OptionError: a model with DeepStack.
    """

    @property
    def merges(self) -> bool:
        return True

    def choose_tokens(self, stage: PruningStage) -> KeptTokens:
        kept, hidden = super().choose_tokens(stage), stage.hidden.clone()
        for row, slots in images_of(stage):
            stays, image = kept.visual[row, slots], stage.hidden[row, slots]
            if bool(stays.any()):
                goes_to = choices.nearest_site(len(slots), stays)
                hidden[row, slots[stays]] = choices.merged(image, stays, goes_to)
        return KeptTokens(kept.visual, kept.counts, hidden)
