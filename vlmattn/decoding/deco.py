"""DeCo: dynamic correction decoding (arXiv 2410.11779)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.decoding.contrast import ContrastiveDecoding, Decoding
from vlmattn.options import MANY, option, some_layers
from vlmattn.registry import register


@dataclass(frozen=True)
class SurestLayer:
    """Add an early layer:  s = l + alpha p_j(v) l_j  for the layer j and the candidate v with the largest p_j(v)."""

    alpha: float
    top_p: float
    top_k: int

    def candidates(self, main: Tensor) -> Tensor:
        """Tokens among the ``top_k`` and within the smallest set that holds ``top_p``; bool, in ``main``'s shape."""
        ranked, order = main.softmax(-1).sort(-1, descending=True)
        inside = ranked.cumsum(-1) - ranked < self.top_p
        inside[..., self.top_k :] = False
        inside[..., :1] = True
        return torch.zeros_like(inside).scatter(-1, order, inside)

    def __call__(self, main: Tensor, others: Sequence[Tensor], t: Tensor) -> Tensor:
        early, keep = torch.stack(list(others)), self.candidates(main)
        sureness = early.softmax(-1).masked_fill(~keep, 0).amax(-1)  # [layer, row, position]
        surest, layer = sureness.max(0)
        chosen = early.gather(0, layer[None, ..., None].expand(1, *main.shape))[0]
        return (main + self.alpha * surest[..., None] * chosen).masked_fill(~keep, -torch.inf)


@register(
    "deco",
    paper="arXiv:2410.11779 (ICLR 2025)",
    code="github.com/zjunlp/DeCo",
    faithful="golden",
    parts="decoding",
    cost="one head per early layer and token",
    presets={"deco": ("released scripts: alpha = .6, layers 20..28 of 32, top-k 20, top-p .9", {})},
)
@dataclass(frozen=True, kw_only=True)
class DeCo(Decoding):
    """Add what the surest of the later middle layers says:

        C = top-p and top-k of the last layer,   (j, v) = argmax_{j in layers, v in C} p_j(v)
        s = l + alpha p_j(v) l_j   on C

    Layer i means the residual stream that enters layer i, through the final norm and the head; the paper's layer l is
    ``i = l``. Tokens outside C are dropped.

    Raises:
        OptionError: an option out of range, no layer left.
    """

    alpha: float = option(0.6, 0, 100, "strength", source="released scripts; its README has .5")
    top_p: float = option(0.9, 0, 1, "mass of the candidates", source="released code")
    top_k: int = option(20, 1, 10**9, "number of candidates", source="released code")
    layers: str = option("20/32:28/32+1", about="candidate layers", source="released code: 20..28 of 32")

    def __post_init__(self) -> None:
        super().__post_init__()
        some_layers(self.layers, MANY, "deco.layers")

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        layers = some_layers(self.layers, anatomy.layers, "deco.layers")
        return ContrastiveDecoding((), SurestLayer(self.alpha, self.top_p, self.top_k), layers)
