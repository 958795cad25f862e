"""Rules from the attention masses of a row's key groups to gains (M_g, W_g, gamma and delta as in edit.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vlmattn.errors import OptionError

_TINY = 1e-20  # less mass than this is none


@dataclass(frozen=True)
class MassGate:
    """A condition on a row's group masses: ``sum_g weights_g M_g >= bound``."""

    weights: tuple[float, ...]
    bound: float


class Plan(Protocol):
    """A rule from group masses to gains."""

    @property
    def groups(self) -> int: ...

    def gains(self, mass: Tensor, weighted: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """gamma and delta (None = 0) from M_g and W_g (None = no weights), each ``[batch, heads, query, groups]``."""
        ...


@dataclass(frozen=True)
class GainPlan:
    """Move mass between groups. With pool = sum_g taken_g M_g and room = sum_g given_g M_g:

        gamma_g = 1 - taken_g + given_g pool / room      (taken and given cost no mass: the row sum stays)

    where every gate holds and room > 0; elsewhere gamma = 1, so nothing is taken that cannot be given.
    ``scale_g`` then multiplies gamma_g; with ``renormalise`` the row's mass is brought back to what it was.
    """

    taken: tuple[float, ...]
    given: tuple[float, ...]
    scale: tuple[float, ...] | None = None
    gates: tuple[MassGate, ...] = ()
    renormalise: bool = False
    _made: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        sizes = {len(self.taken), len(self.given)} | {len(gate.weights) for gate in self.gates}
        if self.scale is not None:
            sizes.add(len(self.scale))
        if len(sizes) != 1:
            raise OptionError(f"GainPlan: all parts need one value per group, got lengths {sorted(sizes)}")

    @property
    def groups(self) -> int:
        return len(self.taken)

    def gains(self, mass: Tensor, weighted: Tensor | None) -> tuple[Tensor, None]:
        """As ``Plan.gains``; any leading dimensions."""
        weights, margins, kept, given = self._tables(mass)
        sums = torch.nn.functional.linear(mass, weights, margins)
        ratio = sums[..., :1] / sums[..., 1:2].clamp_min(_TINY)
        gamma = torch.where((sums >= 0).all(-1, keepdim=True), torch.addcmul(kept, given, ratio), 1.0)
        if self.scale is not None:
            gamma = gamma * mass.new_tensor(self.scale)
        if self.renormalise:
            gamma = gamma * _back_to(mass, gamma * mass)
        return gamma, None

    def _tables(self, like: Tensor) -> tuple[Tensor, ...]:
        """Weights ``[3 + gates, groups]`` and margins of pool, room, enough room, gates; what is kept; what is given.

        Made once: in a decode step the number of operations is the cost.
        """
        key = (like.dtype, like.device)
        if key not in self._made:
            weights = (self.taken, self.given, self.given, *(gate.weights for gate in self.gates))
            margins = (0.0, 0.0, -_TINY, *(-gate.bound for gate in self.gates))
            kept = tuple(1 - taken for taken in self.taken)
            self._made[key] = tuple(like.new_tensor(row) for row in (weights, margins, kept, self.given))
        return self._made[key]


@dataclass(frozen=True)
class BoostPlan:
    """Boost the weighted keys of group 1 in the heads that attend to it most, and group 2 by the same ratio in its own.

    With H_1 and H_2 the floor(``share`` heads) heads of largest M_1 and M_2 in a row:

        a_j <- w_j a_j in group 1, heads H_1;   r = sum_{H_1} W_1 / sum_{H_1} M_1;   a_j <- r a_j in group 2, heads H_2

    then every row gets back the mass it had. Groups: 0 the rest, 1, 2. Of equal heads (to 1e-5) the first count.
    """

    share: float = 0.5

    @property
    def groups(self) -> int:
        return 3

    def gains(self, mass: Tensor, weighted: Tensor | None) -> tuple[Tensor, Tensor]:
        """As ``Plan.gains``; needs key weights."""
        if weighted is None:
            raise OptionError("BoostPlan needs GainPart.weight")
        top = int(self.share * mass.shape[1])

        def most(group: int) -> Tensor:  # [batch, heads, query]
            rounded = (mass[..., group] * 1e5).round()  # rounding errors must not choose between equal heads
            index = rounded.sort(dim=1, descending=True, stable=True).indices[:, :top]
            return torch.zeros_like(mass[..., group]).scatter(1, index, 1.0)

        first, second = most(1), most(2)
        plain = (first * mass[..., 1]).sum(1, keepdim=True)
        ratio = torch.where(
            plain > _TINY, (first * weighted[..., 1]).sum(1, keepdim=True) / plain.clamp_min(_TINY), 1.0
        )
        one, zero = torch.ones_like(first), torch.zeros_like(first)
        gamma = torch.stack([one, 1 - first, 1 + (ratio - 1) * second], -1)
        delta = torch.stack([zero, first, zero], -1)
        back = _back_to(mass, gamma * mass + delta * weighted)
        return gamma * back, delta * back


@dataclass(frozen=True)
class LevelPlan:
    """Even out the mass of ``groups`` groups: gamma_g = 1 - strength + strength mean_g(M_g) / M_g.

    Groups without mass are left out of the mean, so the row sum stays.
    """

    groups: int
    strength: float

    def gains(self, mass: Tensor, weighted: Tensor | None) -> tuple[Tensor, None]:
        """As ``Plan.gains``; any leading dimensions."""
        filled = mass > _TINY
        mean = mass.sum(-1, keepdim=True) / filled.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(filled, 1 - self.strength + self.strength * mean / mass.clamp_min(_TINY), 1.0), None


def _back_to(mass: Tensor, changed: Tensor) -> Tensor:
    """The factor ``[..., 1]`` that gives a row of masses ``changed`` the sum of ``mass``."""
    after = changed.sum(-1, keepdim=True)
    return torch.where(after > 0, mass.sum(-1, keepdim=True) / after.clamp_min(_TINY), 1.0)
