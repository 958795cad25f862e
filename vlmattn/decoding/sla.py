"""SLA: what late layers would say is mixed into what the last one says (arXiv 2502.03628)."""

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
class MixedLayers:
    """``s = (1 - alpha) l + alpha mean_j l_j`` of logits."""

    alpha: float

    def __call__(self, main: Tensor, others: Sequence[Tensor], t: Tensor) -> Tensor:
        return (1 - self.alpha) * main + self.alpha * torch.stack(list(others)).mean(0)


@register(
    "sla",
    paper="arXiv:2502.03628 (ICML 2025)",
    code="github.com/LzVv123456/VISTA (MIT)",
    faithful="released code, formula checked",
    parts="decoding",
    cost="one head per layer and token",
    presets={"sla": ("released default: layers 26..31 of 32, a share of .3", {})},
)
@dataclass(frozen=True, kw_only=True)
class SLA(Decoding):
    """Self-logits augmentation, the other half of VISTA (``vista+sla``):  s = (1 - alpha) l + alpha mean_j l_j

    with l_j the head on what enters layer j, without the final norm, as released.

    Raises:
        OptionError: an option out of range, no layer.
    """

    alpha: float = option(0.3, 0, 1, "share of the late layers", source="released default")
    layers: str = option("26/32:32/32", about="layers that say something", source="released: put out by 25..30 of 32")

    def __post_init__(self) -> None:
        super().__post_init__()
        some_layers(self.layers, MANY, "sla.layers")

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        layers = some_layers(self.layers, anatomy.layers, "sla.layers")
        return ContrastiveDecoding((), MixedLayers(self.alpha), layers, normed=False)
