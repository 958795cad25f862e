"""Nullu: hidden states are taken off the subspace of hallucinated answers (arXiv 2412.13817)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmattn.interventions.steering import ROWS, FromFile
from vlmattn.kernels import Project, ResidualPart, Rows
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "nullu",
    paper="arXiv:2412.13817 (CVPR 2025)",
    code="github.com/Ziwei-Zheng/Nullu (MIT)",
    faithful="formula: the projection that the release writes into weights; experimental: directions of your own",
    parts="residual",
    cost="one product with the directions in the MLP of each layer",
    presets={
        "nullu": ("4 directions, layers 16..31 of 32, all rows", {}),
        "nullu_random": ("control: a random subspace", {"draw": 1}),
    },
)
@dataclass(frozen=True, kw_only=True)
class Nullu(FromFile):
    """Take what the MLPs put out off the subspace in which answers with and without hallucinated things differ.

        x <- x - strength x V^T V,   V: the first ``rank`` directions of the layer (or all it has), orthonormal

    The release multiplies the last matrix of the MLP by (I - V^T V), which is the same (biases aside). Counts layers.
    """

    site: ClassVar[Literal["layer", "mlp"]] = "mlp"
    rows: str = option("all", about="rows that change", choices=ROWS)
    layers: str = option("16/32:", about="decoder layers", source="paper: 16..31 of 32")
    rank: int = option(4, 1, 4096, "directions", source="paper: 4 for LLaVA-1.5")
    strength: float = option(1.0, 0, 1, "share of the subspace that goes")

    def parts(self, context: LayerContext, rows: Rows | None) -> tuple[ResidualPart, ...]:
        if not self.strength:
            return ()

        def basis() -> Tensor:
            found: Tensor = torch.linalg.qr(self.directions(context)[: self.rank].T).Q.T
            return found

        kept: Tensor = context.store(self).once("basis", basis)
        return (Project(rows=rows, basis=kept, strength=self.strength),)
