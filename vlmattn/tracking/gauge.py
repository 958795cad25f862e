"""Similarities: every pass of a multi-view network has a world and a unit of its own; these bring it into the map's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SPREAD = 0.05  # of the mean depth: camera centres nearer than this tell no scale


@dataclass(frozen=True)
class Similarity:
    """``x -> scale * rotation @ x + translation``; of a pose the centre moves so and the rotation turns, unscaled.

    Attributes:
        scale: ``[]``.
        rotation: ``[3, 3]``.
        translation: ``[3]``.
    """

    scale: Tensor
    rotation: Tensor
    translation: Tensor

    @classmethod
    def to_camera(cls, pose: Tensor) -> Similarity:
        """The rigid motion after which this camera is the origin."""
        turn = pose[:3, :3].transpose(-1, -2)
        return cls(pose.new_ones(()), turn, -turn @ pose[:3, 3])

    def points(self, points: Tensor) -> Tensor:
        """Move ``[..., 3]``."""
        return self.scale * points @ self.rotation.transpose(-1, -2) + self.translation

    def poses(self, poses: Tensor) -> Tensor:
        """Move ``[..., 4, 4]``; rotations stay rotations."""
        moved = poses.clone()
        moved[..., :3, :3] = self.rotation @ poses[..., :3, :3]
        moved[..., :3, 3] = self.points(poses[..., :3, 3])
        return moved


def nearest_rotation(matrices: Tensor) -> Tensor:
    """The rotations nearest to matrices ``[..., 3, 3]`` (of the sum of ``target source^T``: the best fit)."""
    u, _, vt = torch.linalg.svd(matrices)
    flip = torch.ones_like(u[..., 0, :])
    flip[..., 2] = torch.det(u @ vt).sign()
    turn: Tensor = (u * flip[..., None, :]) @ vt
    return turn


def rotations(quaternions: Tensor) -> Tensor:
    """Rotation matrices ``[..., 3, 3]`` of unit quaternions ``[..., 4]`` (x, y, z, w)."""
    x, y, z, w = quaternions.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def align(source: Tensor, target: Tensor, fallback: Tensor | None = None, depth: Tensor | None = None) -> Similarity:
    """The similarity that brings poses ``source`` ``[n, 4, 4]`` onto ``target``, the same cameras in another world.

    The rotation is the mean of ``R_target R_source^T`` (chordal), which two cameras or a straight walk determine too;
    scale and translation then fit the centres by least squares. Where the centres lie closer together than a twentieth
    of ``depth`` they tell no scale, and ``fallback`` is taken.

    Args:
        source, target: camera-to-world poses.
        fallback: ``[]``, scale to take where the centres tell none; default 1.
        depth: ``[]``, mean depth of the scene in the unit of ``source``; None: any spread will do.
    """
    source, target = source.double(), target.double()
    turn = nearest_rotation((target[:, :3, :3] @ source[:, :3, :3].transpose(-1, -2)).sum(0))
    from_, to = source[:, :3, 3], target[:, :3, 3]
    mean_from, mean_to = from_.mean(0), to.mean(0)
    turned = (from_ - mean_from) @ turn.transpose(-1, -2)
    spread = turned.square().sum()
    fitted = (turned * (to - mean_to)).sum() / spread.clamp_min(torch.finfo(spread.dtype).tiny)
    least = 0.0 if depth is None else _SPREAD * depth.double()
    tells = (spread / len(source) > least**2) & (fitted > 0)
    scale = torch.where(tells, fitted, torch.ones_like(fitted) if fallback is None else fallback.double())
    return Similarity(scale, turn, mean_to - scale * turn @ mean_from)
