"""The world of the bundled tracker: rooms with textured walls and furniture, ray-cast. OpenCV camera-to-world poses.

A room is a convex prism of five walls at random angles, a floor and a ceiling, with boxes turned at random along the
walls. No axis is marked, so a single picture does not tell where in the room it was taken: other views must.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 48  # pixels
FIELD_OF_VIEW = 75.0  # degrees
WALLS = 5
BOXES = 3
_HEIGHT = 2.0  # floor to ceiling, the same everywhere: it sets the scale
_WAVES = 10  # of the texture
_TURNS = 1.4  # of a walk
_REACH = 0.75  # how far from the middle of the room the camera goes
_YAW, _PITCH, _ROLL = 40.0, 15.0, 6.0  # degrees to either side


@dataclass(frozen=True)
class Rooms:
    """A batch of rooms; every tensor starts with ``[rooms]``."""

    normals: Tensor  # [rooms, planes, 3], out of the room
    distances: Tensor  # [rooms, planes]
    centres: Tensor  # [rooms, boxes, 3]
    halves: Tensor  # [rooms, boxes, 3]
    turns: Tensor  # [rooms, boxes], radians about the vertical
    waves: Tensor  # [rooms, waves, 3], radians per unit
    phases: Tensor  # [rooms, waves]
    colours: Tensor  # [rooms, waves, 3]
    tints: Tensor  # [rooms, planes + boxes, 3]
    heading: Tensor  # [rooms], the yaw about which the camera looks

    def __len__(self) -> int:
        return len(self.heading)


def make_rooms(count: int, generator: torch.Generator) -> Rooms:
    """Random rooms."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    angle = torch.arange(WALLS) * (2 * math.pi / WALLS) + uniform(-0.4, 0.4, WALLS) + uniform(0, 2 * math.pi, 1)
    level = torch.zeros(count, WALLS)
    walls = torch.stack([angle.cos(), level, angle.sin()], -1)
    up = torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]]).expand(count, 2, 3)
    distances = torch.cat([uniform(1.3, 2.0, WALLS), torch.full((count, 2), _HEIGHT / 2)], 1)
    halves = uniform(0.15, 0.3, BOXES, 3)
    along = torch.arange(BOXES) * (2 * math.pi / BOXES) + uniform(-0.8, 0.8, BOXES) + uniform(0, 2 * math.pi, 1)
    away = uniform(1.2, 1.45, BOXES)
    centres = torch.stack([away * along.cos(), uniform(-0.6, 0.8, BOXES), away * along.sin()], -1)
    pitch = torch.linspace(1.0, 5.0, _WAVES)[:, None]
    return Rooms(
        normals=torch.cat([walls, up], 1),
        distances=distances,
        centres=centres,
        halves=halves,
        turns=uniform(0, 2 * math.pi, BOXES),
        waves=torch.nn.functional.normalize(normal(_WAVES, 3), dim=-1) * pitch,
        phases=uniform(0, 2 * math.pi, _WAVES),
        colours=normal(_WAVES, 3) * torch.linspace(0.5, 0.3, _WAVES)[:, None],
        tints=normal(WALLS + 2 + BOXES, 3) * 0.9,
        heading=uniform(0, 2 * math.pi),
    )


def random_poses(rooms: Rooms, views: int, generator: torch.Generator, spread: float = 1.0) -> Tensor:
    """Unordered camera poses ``[rooms, views, 4, 4]``; ``spread`` 0 to 1 scales how far they lie apart."""
    drawn = torch.rand(len(rooms), views, 6, generator=generator) * 2 - 1
    return _poses(rooms, drawn * spread)


def smooth_poses(rooms: Rooms, frames: int, generator: torch.Generator) -> Tensor:
    """A camera that walks through the room: ``[rooms, frames, 4, 4]``."""
    time = torch.linspace(0, 1, frames)[None, :, None]
    path = torch.zeros(len(rooms), frames, 6)
    for harmonic in (1, 2, 3):
        height = torch.randn(len(rooms), 1, 6, generator=generator) / harmonic
        phase = torch.rand(len(rooms), 1, 6, generator=generator) * 2 * math.pi
        path = path + height * torch.sin(math.pi * _TURNS * harmonic * time + phase)
    return _poses(rooms, torch.tanh(path))


def _poses(rooms: Rooms, drawn: Tensor) -> Tensor:
    """From numbers in -1..1: yaw, pitch, roll, two for the place in a disk, one for the height."""
    yaw = rooms.heading[:, None] + math.radians(_YAW) * drawn[..., 0]
    pitch, roll = math.radians(_PITCH) * drawn[..., 1], math.radians(_ROLL) * drawn[..., 2]
    place = drawn[..., 3:5]
    place = place / (place.norm(dim=-1, keepdim=True) / place.abs().amax(-1, keepdim=True).clamp_min(1e-6)).clamp_min(1)
    pose = torch.eye(4).repeat(*drawn.shape[:2], 1, 1)
    pose[..., :3, :3] = rotation(yaw, pitch, roll)
    pose[..., 0, 3], pose[..., 2, 3] = _REACH * place[..., 0], _REACH * place[..., 1]
    pose[..., 1, 3] = 0.25 * drawn[..., 5]
    return pose


def rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Camera-to-world rotations ``[..., 3, 3]``, angles in radians."""
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, -1).view(*yaw.shape, 3, 3)

    about_y = matrix(yaw.cos(), zero, yaw.sin(), zero, one, zero, -yaw.sin(), zero, yaw.cos())
    about_x = matrix(one, zero, zero, zero, pitch.cos(), -pitch.sin(), zero, pitch.sin(), pitch.cos())
    about_z = matrix(roll.cos(), -roll.sin(), zero, roll.sin(), roll.cos(), zero, zero, zero, one)
    turned: Tensor = about_y @ about_x @ about_z
    return turned


def rays(size: int = SIZE) -> Tensor:
    """Directions of the pixels in the camera, depth 1: ``[size, size, 3]``."""
    focal = size / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
    grid = (torch.arange(size) + 0.5 - size / 2) / focal
    down, right = torch.meshgrid(grid, grid, indexing="ij")
    return torch.stack([right, down, torch.ones_like(right)], -1)


@torch.no_grad()
def render(rooms: Rooms, poses: Tensor, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Pictures ``[rooms, views, 3, size, size]`` in [0, 1] and camera points ``[rooms, views, size, size, 3]``."""
    directions = rays(size)
    ray = torch.einsum("rvij,hwj->rvhwi", poses[..., :3, :3], directions)
    origin = poses[..., None, None, :3, 3]
    along = torch.einsum("rvhwi,rpi->rvhwp", ray, rooms.normals)
    room = rooms.distances[:, None] - torch.einsum("rvi,rpi->rvp", poses[..., :3, 3], rooms.normals)
    reach = torch.where(along > 1e-6, room[:, :, None, None] / along.clamp_min(1e-6), torch.inf)
    depth, surface = reach.min(-1)
    for box in range(BOXES):
        near, far = _box(rooms, box, ray, origin)
        hit = (near < far) & (near > 0.05) & (near < depth)
        depth = torch.where(hit, near, depth)
        surface = torch.where(hit, rooms.normals.shape[1] + box, surface)
    point = origin + ray * depth[..., None]
    wave = torch.sin(torch.einsum("rvhwi,rfi->rvhwf", point, rooms.waves) + rooms.phases[:, None, None, None])
    colour = torch.einsum("rvhwf,rfc->rvhwc", wave, rooms.colours)
    tint = rooms.tints[torch.arange(len(rooms))[:, None, None, None], surface]
    light = point[..., 1:2] * torch.tensor([0.6, 0.4, 0.2])  # from above: which way is down
    image = torch.sigmoid(1.2 * (colour + tint - light))
    return image.permute(0, 1, 4, 2, 3).contiguous(), directions * depth[..., None]


def _box(rooms: Rooms, box: int, ray: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave one box of each room."""
    turn = rooms.turns[:, box]
    level = torch.zeros_like(turn)
    frame = rotation(turn, level, level)
    ray = torch.einsum("rij,rvhwi->rvhwj", frame, ray)
    start = torch.einsum("rij,rvhwi->rvhwj", frame, origin - rooms.centres[:, box, None, None, None])
    half = rooms.halves[:, box, None, None, None]
    inverse = 1 / torch.where(ray.abs() < 1e-6, torch.full_like(ray, 1e-6), ray)
    one, other = (-half - start) * inverse, (half - start) * inverse
    return torch.minimum(one, other).amax(-1), torch.maximum(one, other).amin(-1)
