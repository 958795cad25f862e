"""VisPruner: keep the image tokens that the vision tower looks at, and unlike ones of the rest (arXiv 2412.01818)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmattn.interventions.pruning.early import Tokens, TowerPruning
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "vispruner",
    paper="arXiv:2412.01818 (ICCV 2025)",
    code="github.com/Theia-4869/VisPruner",
    faithful="golden (the choice, with CLIP towers)",
    parts="keep",
    cost="all layers run on the rest, from the first on; the vision tower is as it was. Decode: fewer keys",
    presets={
        "vispruner": ("released default: 64 of the 576 tokens of LLaVA-1.5, half of them for being unlike", {}),
        "vispruner_128": ("128 of the 576 tokens of LLaVA-1.5", {"keep_ratio": 128 / 576}),
        "fastervlm": ("the first version of the paper: all by what the tower looks at", {"important": 1.0}),
        "fastervlm_128": ("the same, 128 of 576 tokens", {"important": 1.0, "keep_ratio": 128 / 576}),
    },
)
@dataclass(frozen=True, kw_only=True)
class VisPruner(TowerPruning):
    """Before the first layer keep tokens that the CLS token attends to, and of the others those without a double.

    With a the attention of the CLS token in the last but one layer of the tower, mean over heads, and T =
    round(keep_ratio n) of an image's n tokens:

        important: the int(important T) tokens with the highest a
        of the rest, by falling a, at most 8 a round go until T - int(important T) are left: of those at even places the
        ones whose greatest cosine with any at odd places is highest; those at odd places stay behind the others

    with cosines of what the tower says of the tokens. Towers without a CLS token: a is the mean query's attention
    (ours). Kept tokens have their order and position ids. Counts dropped tokens.
    """

    keep_ratio: float = option(64 / 576, 0, 1, "share of the tokens of each image that stays", source="released: 64")
    important: float = option(0.5, 0, 1, "share of the kept tokens that the tower chooses", source="released: .5")
    at_once: int = option(8, 1, 10**6, "tokens that go in a round", source="released: 8")

    def comparing(self, layer: int, given: Sequence[int], width: int) -> int:
        total = 0
        for tokens in given:
            count = self.budget(tokens)
            first = int(self.important * count)
            left, wanted = tokens - first, count - first
            while wanted and left > max(wanted, 1):
                total += 2 * width * (left - left // 2) * (left // 2)
                left -= min(self.at_once, left - wanted, left - left // 2)
        return total

    def pick(self, tokens: Tokens, count: int) -> Tensor:
        assert tokens.seen is not None
        assert tokens.features is not None
        order = tokens.seen.argsort(dim=1, descending=True, stable=True)
        first = int(self.important * count)
        rest = self._without_doubles(order[:, first:], tokens.features, count - first)
        stays = torch.zeros_like(tokens.seen, dtype=torch.bool)
        return stays.scatter_(1, torch.cat([order[:, :first], rest], 1), True)

    def _without_doubles(self, rest: Tensor, features: Tensor, count: int) -> Tensor:
        """``count`` of the tokens ``rest`` ``[images, left]``."""
        if not count:
            return rest[:, :0]
        unit = normalize(features.float(), dim=-1)
        while (gone := min(self.at_once, rest.shape[1] - count, -(-rest.shape[1] // 2))) > 0:
            even, odd = rest[:, ::2], rest[:, 1::2]
            if not odd.shape[1]:
                return rest[:, :count]
            one, other = (unit.gather(1, part[..., None].expand(-1, -1, unit.shape[2])) for part in (even, odd))
            alike = (one @ other.transpose(1, 2)).amax(-1)
            left = alike.argsort(dim=1, descending=True, stable=True)[:, gone:]
            rest = torch.cat([even.gather(1, left), odd], 1)
        return rest
