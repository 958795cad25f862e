"""VScan: tokens that the vision tower looks at, in windows and in all; fewer in the middle (arXiv 2505.22654)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError
from vlmattn.interventions.base import check_tower
from vlmattn.interventions.pruning import choices
from vlmattn.interventions.pruning.base import Pruning
from vlmattn.interventions.pruning.early import TowerChoice, images_of
from vlmattn.options import MANY, option, parse_layers
from vlmattn.registry import register
from vlmattn.request import Image, KeptTokens, PruningStage


@register(
    "vscan",
    paper="arXiv:2505.22654 (TMLR 2026)",
    code="github.com/Tencent/SelfEvolvingAgent (VScan)",
    faithful="released code, formula checked; tokens at their own places, other sizes than 24 x 24 (ours)",
    parts="keep",
    cost="all layers run on fewer tokens, later ones on a third of these; queries and keys of one layer once more",
    presets={"vscan": ("released default: 96 of 576 tokens, 32 of them from layer 16 of 32 on", {})},
)
@dataclass(frozen=True, kw_only=True)
class VScan(TowerChoice):
    """Keep tokens that the CLS token attends to, from everywhere, and drop more in the middle of the stack.

    With s and d the attention of the CLS token in a shallow layer of the tower (the 6th of 24) and in the last but one,
    mean over heads, T = round(keep_ratio n) of an image's n tokens, the image cut into ``windows`` each way:

        local:   in each window the int(T / 2) // windows^2 tokens with the highest s
        whole:   of the others those with the highest d, until there are T
        merging: every other token joins the kept one most alike (cosine); means take their place
        middle:  before the layer ``middle`` the round(middle_ratio T) tokens with the highest attention that the last
                 prompt token would pay there, mean over heads

    Tokens that make no square, or one that does not divide, are cut into windows^2 runs (ours). Kept tokens have their
    order and position ids. Counts dropped tokens.

    Raises:
        UnsupportedError: a family whose image tokens are not those of its tower. OptionError: a tower of one layer, a
            model that adds image features in later layers. InputError: image features were given instead of pixels.
    """

    keep_ratio: float = option(96 / 576, 0, 1, "share of an image's tokens before the first layer", source="released")
    middle: str = option("16/32", about="first layer of the second stage", source="released: 16 of 32")
    middle_ratio: float = option(1 / 3, 0, 1, "share of those that stays in the middle", source="released: 32 of 96")
    windows: int = option(4, 1, 64, "windows of an image each way", source="released: 6 x 6 of 24 x 24 tokens")

    looks_ahead: ClassVar[bool] = True

    @property
    def merges(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(parse_layers(self.middle, MANY, "vscan.middle")) != 1:
            raise OptionError(f"vscan.middle must name one layer, got '{self.middle}'")

    def bind(self, anatomy: Anatomy) -> Pruning:
        bound = replace(self, middle=str(self.stages(anatomy)[-1]))
        return TowerChoice.bind(bound, anatomy)

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        (layer,) = parse_layers(self.middle, anatomy.layers, "vscan.middle")
        layer = max(layer, 1) if "/" in self.middle else layer
        while "/" in self.middle and layer < anatomy.layers - 1 and not anatomy.attends(layer):
            layer += 1
        if layer < 1:
            raise OptionError(f"vscan.middle must be a layer behind the first, got {layer}")
        return (0, layer)

    def looks_ahead_at(self, layer: int) -> bool:
        return layer > 0

    def tower_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        check_tower("vscan", anatomy)
        deep = anatomy.tower_layers - 2
        return tuple(sorted({min(anatomy.tower_layers * 5 // 24, deep), deep}))

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        return sum(map(self.budget, given)) if layer == 0 else round(self.middle_ratio * left)

    def comparing(self, layer: int, given: Sequence[int], width: int) -> int:
        return 0 if layer else sum(2 * width * tokens * self.budget(tokens) for tokens in given)

    def of_image(self, image: Image) -> Tensor:
        shallow, deep = (image.attention[layer].mean(0) for layer in (min(image.attention), max(image.attention)))
        tokens, count = len(deep), self.budget(len(deep))
        each = count // 2 // self.windows**2
        stays = torch.zeros_like(deep, dtype=torch.bool)
        for window in _windows(tokens, self.windows, deep.device):
            stays[window] = choices.top(shallow[None, window], each)[0]
        rest = choices.top(deep.masked_fill(stays, float("-inf"))[None], count - int(stays.sum()))[0]
        return stays | rest

    def choose_tokens(self, stage: PruningStage) -> KeptTokens:
        if stage.layer:
            row = stage.request.prompt_length - 1 - stage.start
            seen = stage.weights(row, row + 1)[:, :, 0].mean(1)
            counts = self.counts(stage)
            return KeptTokens(stage.top(seen[:, stage.start : stage.start + stage.hidden.shape[1]], counts), counts)
        kept, hidden = TowerChoice.choose_tokens(self, stage), stage.hidden.clone()
        for row, slots in images_of(stage):
            stays, image = kept.visual[row, slots], stage.hidden[row, slots]
            if bool(stays.any()):
                hidden[row, slots[stays]] = choices.merged(image, stays, choices.most_alike(image, stays))
        return KeptTokens(kept.visual, kept.counts, hidden)


def _windows(tokens: int, each_way: int, device: torch.device) -> list[Tensor]:
    """Numbers of the tokens in each window."""
    numbers, side = torch.arange(tokens, device=device), round(tokens**0.5)
    if side * side != tokens or side % each_way:
        return list(numbers.tensor_split(each_way**2))
    rows = numbers.view(each_way, side // each_way, each_way, side // each_way)
    return list(rows.transpose(1, 2).reshape(each_way**2, -1))
