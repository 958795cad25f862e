"""DivPrune: keep the image tokens that are most unlike each other (arXiv 2503.02175)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vlmattn.interventions.pruning import choices
from vlmattn.interventions.pruning.early import EarlyPruning, Tokens
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "divprune",
    paper="arXiv:2503.02175 (CVPR 2025)",
    code="not used: non-commercial licence",
    faithful="paper text",
    parts="keep",
    cost="prefill: pairs of an image's tokens, a greedy choice; all layers run on the rest. Decode: fewer keys",
    presets={
        "divprune": ("paper: 9.8 % of the image tokens, before the first layer", {}),
        "divprune_128": ("128 of the 576 tokens of LLaVA-1.5", {"keep_ratio": 128 / 576}),
        "divprune_64": ("64 of the 576 tokens of LLaVA-1.5", {"keep_ratio": 64 / 576}),
    },
)
@dataclass(frozen=True, kw_only=True)
class DivPrune(EarlyPruning):
    """Before the first layer keep the tokens of each image that lie farthest apart, whatever is asked.

    With x the n tokens of an image as the language model gets them, d(i, j) = 1 - cos(x_i, x_j), and S what is taken:

        first: argmax_i min_{j != i} d(i, j);   then, until round(keep_ratio n) are taken: argmax_i min_{j in S} d(i, j)

    the greedy solution of the max-min diversity problem. Kept tokens have their order and their position ids. Each
    image is chosen from by itself. Counts dropped tokens.
    """

    keep_ratio: float = option(0.098, 0, 1, "share of the tokens of each image that stays", source="paper: 9.8 %")

    def comparing(self, layer: int, given: Sequence[int], width: int) -> int:
        return sum(2 * width * tokens**2 for tokens in given)

    def pick(self, tokens: Tokens, count: int) -> Tensor:
        return choices.farthest(tokens.embeddings, count)
