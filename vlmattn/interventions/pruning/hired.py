"""HiRED: a budget for each tile by what the tower looks at, and in each tile its most attended tokens (2408.10945)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import UnsupportedError
from vlmattn.interventions.base import check_tower
from vlmattn.interventions.pruning import choices
from vlmattn.interventions.pruning.early import TowerChoice
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import Image


@register(
    "hired",
    paper="arXiv:2408.10945 (AAAI 2025)",
    code="github.com/hasanar1f/HiRED",
    faithful="golden (the choice, with CLIP towers)",
    parts="keep",
    cost="all layers run on the rest, from the first on; the vision tower is as it was. Decode: fewer keys",
    presets={"hired": ("paper: a fifth of the image tokens, half of them from the whole picture in small", {})},
)
@dataclass(frozen=True, kw_only=True)
class HiRED(TowerChoice):
    """Before the first layer keep tokens of each tile by what its CLS token attends to, more in tiles that matter.

    A picture of n patches is a whole in small (n_0 of them) and tiles t. With f and l the attention of the CLS token of
    each in the tower's first layer and the last but one, summed over heads:

        whole:  the min(int(whole T), n_0) patches with the highest l,  T = int(keep_ratio n)
        tiles:  of the int(n_0 (1 - whole)) patches of the small picture with the highest f, c_t lie in the t-th of
                equal runs of its patches;  each tile keeps the int(c_t / sum c * rest) with the highest l

    Rounding leaves some of the budget unused. Newlines behind rows of tiles go, as in the released code, which counts
    patches on the padding of tiles besides (ours counts those that are in the prompt). A picture that is not cut keeps
    its T patches with the highest l. Kept tokens have their order and position ids. Counts dropped tokens.

    Raises:
        UnsupportedError: a family whose image tokens are not those of its tower. OptionError: a tower of one layer.
        InputError: image features were given instead of pixels.
    """

    keep_ratio: float = option(0.2, 0, 1, "share of the tokens of each image that stays", source="paper: .2")
    whole: float = option(0.5, 0, 1, "share of the budget for the picture in small", source="paper: alpha = .5")

    def tower_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        check_tower("hired", anatomy)
        return tuple(sorted({0, anatomy.tower_layers - 2}))

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        raise UnsupportedError(
            "how many tokens hired keeps is known only once the picture is read; leave it out of cost(), or measure it"
            " with vlmattn bench"
        )

    def of_image(self, image: Image) -> Tensor:
        first, last = (image.attention[layer].sum(0) for layer in (min(image.attention), max(image.attention)))
        tiles = torch.zeros_like(last, dtype=torch.long) if image.tiles is None else image.tiles.to(last.device)
        total, stays = int(self.keep_ratio * int((tiles >= 0).sum())), torch.zeros_like(last, dtype=torch.bool)
        cut = int(tiles.max())
        small = (tiles == 0).nonzero().flatten()
        budgets = [min(int(total * self.whole), len(small)) if cut else total]
        if cut:
            rest = min(total - budgets[0], int((tiles > 0).sum()))
            looked = choices.top(first[None, small], int(len(small) * (1 - self.whole)))[0]
            counts = torch.stack([run.sum() for run in looked.tensor_split(cut)]).float()
            budgets += (counts / counts.sum().clamp_min(1) * rest).int().tolist()
        for tile, budget in enumerate(budgets):
            own = (tiles == tile).nonzero().flatten()
            stays[own] = choices.top(last[None, own], budget)[0]
        return stays
