"""Ways to choose image tokens for a branch, by the attention of the row before the first new token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError, quoted
from vlmattn.options import some_layers


@dataclass(frozen=True)
class TopAttended:
    """The ``share`` of each row's image tokens with the most attention (mean over ``within`` layers); at least one.

    ``blank``: the features of the others are zeroed and the prompt is read again; else their keys are hidden.
    """

    share: float
    within: str
    blank: bool = False
    name: str = field(default="layers", compare=False)  # of the option that chose ``within``, for errors

    def __post_init__(self) -> None:
        if not isinstance(self.share, (int, float)) or not 0 <= self.share <= 1:
            raise OptionError(f"the share of image tokens that stay must be within 0..1, got {quoted(self.share)}")

    def layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return some_layers(self.within, anatomy.layers, self.name)

    def choose(self, attention: Tensor, visual: Tensor) -> Tensor:
        mean = attention.mean(0).masked_fill(~visual, -1.0)
        count = (visual.sum(-1, keepdim=True).double() * self.share - 1e-9).ceil().clamp(min=1)  # 30 % of 50 are 15
        rank = mean.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        kept: Tensor = visual & (rank < count)
        return kept


@dataclass(frozen=True)
class BlindTokens:
    """Image tokens that draw unusually much attention:  a >= mean + ``deviations`` std  (over the row's image tokens).

    ``a`` is the mean over the layers that look at the image most: ranked by their attention on it, they are taken until
    ``mass`` of the total is reached.
    """

    mass: float
    deviations: float
    blank: ClassVar[bool] = True

    def layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return tuple(range(anatomy.layers))

    def choose(self, attention: Tensor, visual: Tensor) -> Tensor:
        on_image = (attention * visual).sum(-1)  # [layer, batch]
        share = on_image / on_image.sum(0).clamp_min(1e-30)
        ranked, order = share.sort(dim=0, descending=True, stable=True)
        taken = (ranked.cumsum(0) - ranked < self.mass).float()  # the layer that crosses the mass is in
        taken[:1] = 1
        layers = torch.zeros_like(taken).scatter_(0, order, taken)
        mean = torch.einsum("lbk,lb->bk", attention, layers) / layers.sum(0)[:, None].clamp_min(1)
        count = visual.sum(-1, keepdim=True).clamp_min(1)
        centre = (mean * visual).sum(-1, keepdim=True) / count
        spread = (((mean - centre) * visual).square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
        return visual & (mean >= centre + self.deviations * spread)
