"""A network that knows the true poses: every pass tells them, with noise, in a random world and unit of its own.

What world a pass chose is written into the values of its one attention across frames. A frame alone finds there, by
attention, the world of the map it sees, and tells its pose in that; so a tracker that loses its cache loses its gauge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmattn.tracking import Adapter, Similarity, Views
from vlmattn.tracking.rooms import make_rooms, smooth_poses

STEP = 1 / 512  # frame n is a picture of one grey, n * STEP


def picture(number: int, size: int = 4) -> Tensor:
    return torch.full((3, size, size), number * STEP, dtype=torch.float64)


def walk(frames: int = 60, seed: int = 3) -> Tensor:
    """True poses of a camera in a room."""
    draw = torch.Generator().manual_seed(seed)
    poses = smooth_poses(make_rooms(1, draw), frames, draw)[0].double()
    u, _, vt = torch.linalg.svd(poses[:, :3, :3])  # rotations to the last digit
    poses[:, :3, :3] = u @ vt
    return poses


class _Gauge(nn.Module):
    def forward(self, values: Tensor, alone: bool) -> Tensor:
        key = torch.zeros_like(values)
        key[..., 0] = -100.0 if alone else 0.0  # alone: rather the map than itself
        return F.scaled_dot_product_attention(torch.ones_like(values), key, values, scale=1.0)


class Oracle(nn.Module):
    """Args: ``poses`` ``[n, 4, 4]``, camera to world; ``noise`` of centres (length) and turns (radians)."""

    def __init__(self, poses: Tensor, noise: float = 0.0, seed: int = 0, depth: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.gauge = _Gauge()
        self.poses, self.noise, self.depth = poses.double(), noise, depth
        self.draw = torch.Generator().manual_seed(seed)

    def forward(self, images: Tensor) -> Views:
        batch, frames, _, height, width = images.shape
        number = (images.mean((-1, -2, -3)) / STEP).round().long()
        values = self._random_world().expand(batch, 1, frames, -1)
        world = self.gauge(values, alone=frames == 1)[:, 0]  # [batch, frames, 16]
        true = self.poses[number]
        told = true.clone()
        wobble = torch.randn(batch, frames, 2, 3, generator=self.draw, dtype=torch.float64) * self.noise
        told[..., :3, 3] += wobble[..., 0, :]
        told[..., :3, :3] = torch.linalg.matrix_exp(_skew(wobble[..., 1, :])) @ true[..., :3, :3]
        out = torch.stack(
            [torch.stack([_of(world[b, f]).poses(told[b, f]) for f in range(frames)]) for b in range(batch)]
        )
        local = torch.ones(batch, frames, height, width, 3, dtype=torch.float64) * self.depth
        return Views(out, local * world[..., 0, None, None, None], torch.ones(batch, frames, height, width))

    def _random_world(self) -> Tensor:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self.draw, dtype=torch.float64)

        turn = torch.linalg.matrix_exp(_skew(normal(3)))
        return torch.cat(
            [torch.exp(0.7 * normal(1)), turn.flatten(), 3 * normal(3), torch.zeros(3, dtype=torch.float64)]
        )


def _of(world: Tensor) -> Similarity:
    return Similarity(world[0], world[1:10].view(3, 3), world[10:13])


def _skew(axis: Tensor) -> Tensor:
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(*axis.shape[:-1], 3, 3)


class OracleAdapter(Adapter):
    name, multiple, lead = "oracle", 1, 0

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return isinstance(model, Oracle)

    def attentions(self) -> Sequence[nn.Module]:
        return [self.model.gauge]

    def forward(self, images: Tensor, reading: bool) -> Views:
        return self.model(images)
