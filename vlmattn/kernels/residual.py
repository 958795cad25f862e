"""Edits of hidden states as data: what becomes of the rows that a layer, or its MLP, puts out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vlmattn.kernels.edit import Rows


@dataclass(frozen=True, eq=False)
class Near:
    """A gate: only rows x with ``cos(x, direction) >= least``; ``direction`` ``[hidden]``."""

    direction: Tensor
    least: float


@dataclass(frozen=True, eq=False)
class ResidualPart:
    """One change of hidden states x ``[batch, query, hidden]``; every kind is a subclass.

    Attributes:
        rows: the rows that change; None = all. gate: and of those, which.
    """

    rows: Rows | None = None
    gate: Near | None = None

    def changed(self, x: Tensor) -> Tensor:
        """float32 ``[batch, query, hidden]``, all rows."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(ResidualPart):
    """x + vector; ``vector`` ``[hidden]`` or ``[batch, 1, hidden]``."""

    vector: Tensor

    def changed(self, x: Tensor) -> Tensor:
        return x + self.vector


@dataclass(frozen=True, eq=False, kw_only=True)
class Scale(ResidualPart):
    """factor x."""

    factor: float

    def changed(self, x: Tensor) -> Tensor:
        return x * self.factor


@dataclass(frozen=True, eq=False, kw_only=True)
class Project(ResidualPart):
    """Off a subspace, x - strength x B^T B, or onto it, x - strength (x - x B^T B).

    ``basis`` B ``[k, hidden]``, of orthonormal rows.
    """

    basis: Tensor
    strength: float = 1.0
    onto: bool = False

    def changed(self, x: Tensor) -> Tensor:
        within = (x @ self.basis.T) @ self.basis
        return x - self.strength * (x - within if self.onto else within)


@dataclass(frozen=True, eq=False, kw_only=True)
class Turn(ResidualPart):
    """Towards directions, with the norm kept: ``|x| u / |u|`` with ``u = x / |x| + mean_i s_i d_i / |d_i|``.

    ``s_i = strength``, and with ``opposed`` ``strength (1 + max(0, cos(x, -d_i)))``: rows that point away turn more.
    ``directions`` d ``[k, hidden]``, or ``[batch, k, hidden]``.
    """

    directions: Tensor
    strength: float
    opposed: bool = False

    def changed(self, x: Tensor) -> Tensor:
        ways = (self.directions if self.directions.ndim == 3 else self.directions[None])[:, None]
        share = torch.full((), self.strength, device=x.device)
        if self.opposed:
            away = cosine_similarity(x[:, :, None], -ways, dim=-1)
            share = self.strength * (1 + away.clamp_min(0))[..., None]
        pull = (share * normalize(ways, dim=-1)).mean(2)
        turned: Tensor = normalize(normalize(x, dim=-1) + pull, dim=-1) * x.norm(dim=-1, keepdim=True)
        return turned


def steered(x: Tensor, parts: tuple[ResidualPart, ...]) -> Tensor:
    """Hidden states ``[batch, query, hidden]`` after all parts, one after another; other rows stay bit by bit."""
    for part in parts:
        wide, chosen = x.float(), None if part.rows is None else part.rows.mask[..., None]
        if part.gate is not None:
            near = cosine_similarity(wide, part.gate.direction, dim=-1)[..., None] >= part.gate.least
            chosen = near if chosen is None else chosen & near
        found = part.changed(wide).to(x.dtype)
        x = found if chosen is None else torch.where(chosen, found, x)
    return x
