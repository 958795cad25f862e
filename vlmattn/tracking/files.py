"""Trajectories in the TUM format and point clouds as PLY, written whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmattn.errors import InputError
from vlmattn.files import make_folder, write_whole
from vlmattn.texts import lines_of, read_text
from vlmattn.tracking import gauge
from vlmattn.tracking.metrics import FARTHEST, Array, checked_poses, numbers_of


@dataclass(frozen=True)
class Trajectory:
    """Camera poses over time.

    Attributes:
        times: seconds, ``[n]``.
        poses: camera to world, OpenCV axes, ``[n, 4, 4]``.

    Raises:
        InputError: other shapes or types, NaN, or another number of times than of poses.
    """

    times: Array
    poses: Array

    def __post_init__(self) -> None:
        times, poses = numbers_of(self.times, "times"), checked_poses(self.poses)
        if times.shape != poses.shape[:1]:
            raise InputError(f"a trajectory has a time for each pose, got {list(times.shape)} and {list(poses.shape)}")
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "poses", poses)

    @property
    def ascending(self) -> bool:
        """Whether every time is after the one before."""
        return bool((np.diff(self.times) > 0).all())

    def __len__(self) -> int:
        return len(self.times)


def write_tum(path: str | Path, trajectory: Trajectory) -> None:
    """Write ``time tx ty tz qx qy qz qw`` per line, camera to world."""
    lines = ["# timestamp tx ty tz qx qy qz qw"]
    for time, pose, turn in zip(trajectory.times, trajectory.poses, quaternions(trajectory.poses), strict=True):
        numbers = " ".join(f"{number:.9f}" for number in (*pose[:3, 3], *turn))
        lines.append(f"{time:.6f} {numbers}")
    _write(path, "\n".join(lines) + "\n")


def read_tum(path: str | Path) -> Trajectory:
    """Read a TUM trajectory in the order of its lines, as ``evo`` does; lines that begin with # are comments.

    Quaternions are made units. Times may repeat or go back, as where one file holds two runs: nothing is sorted or left
    out.

    Raises:
        InputError: no such text file, or a line that is not eight numbers of a pose (file:line).
    """
    found = []
    for number, line in enumerate(lines_of(read_text(path, what="the trajectory")), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            values = [float(word) for word in line.replace(",", " ").split()]
        except ValueError:
            values = []
        if len(values) != 8 or not all(abs(value) <= FARTHEST for value in values) or not any(values[4:]):
            raise InputError(f"{path}:{number}: a TUM line is 'time tx ty tz qx qy qz qw', got '{line.strip()[:60]}'")
        found.append(values)
    if not found:
        raise InputError(f"{path} holds no pose")
    table = np.array(found, dtype=np.float64)
    poses = np.tile(np.eye(4), (len(table), 1, 1))
    poses[:, :3, :3] = rotations(table[:, 4:])
    poses[:, :3, 3] = table[:, 1:4]
    return Trajectory(table[:, 0], poses)


def quaternions(poses: Any) -> Array:
    """Unit quaternions ``[n, 4]`` (x, y, z, w; w >= 0) of the rotations of ``[n, 4, 4]``.

    The eigenvector of the largest eigenvalue of Bar-Itzhack's matrix, which is good for every angle.
    """
    r = checked_poses(poses)[:, :3, :3]
    xx, yy, zz = r[:, 0, 0], r[:, 1, 1], r[:, 2, 2]
    yx, zx, zy = r[:, 1, 0] + r[:, 0, 1], r[:, 2, 0] + r[:, 0, 2], r[:, 2, 1] + r[:, 1, 2]
    wx, wy, wz = r[:, 2, 1] - r[:, 1, 2], r[:, 0, 2] - r[:, 2, 0], r[:, 1, 0] - r[:, 0, 1]
    rows = [
        [xx - yy - zz, yx, zx, wx],
        [yx, yy - xx - zz, zy, wy],
        [zx, zy, zz - xx - yy, wz],
        [wx, wy, wz, xx + yy + zz],
    ]
    matrix = np.moveaxis(np.array(rows), -1, 0)
    largest = np.linalg.eigh(matrix)[1][:, :, -1]
    return np.asarray(largest * np.where(largest[:, 3:] < 0, -1.0, 1.0), dtype=np.float64)


def rotations(turns: Any) -> Array:
    """Rotation matrices ``[n, 3, 3]`` of quaternions ``[n, 4]`` (x, y, z, w), of any length above 0."""
    q = numbers_of(turns, "quaternions")
    if q.ndim != 2 or q.shape[1] != 4 or not q.any(1).all():
        raise InputError(f"quaternions must be [n, 4] and none of them 0, got {list(q.shape)}")
    q = q / np.abs(q).max(1, keepdims=True)  # first, so that no square is 0 or infinite
    return np.asarray(gauge.rotations(torch.from_numpy(q / np.linalg.norm(q, axis=1, keepdims=True))).numpy())


def write_ply(path: str | Path, points: Any, colours: Any) -> None:
    """Write a coloured point cloud as binary PLY.

    Args:
        points: ``[n, 3]``.
        colours: ``[n, 3]`` in [0, 1].
    """
    place = numbers_of(points, "points").astype(np.float32)
    shade = np.clip(numbers_of(colours, "colours") * 255 + 0.5, 0, 255).astype(np.uint8)
    if place.shape != shade.shape or place.ndim != 2 or place.shape[1] != 3:
        raise InputError(f"points and colours must both be [n, 3], got {list(place.shape)} and {list(shade.shape)}")
    fields = [(axis, "<f4") for axis in "xyz"] + [(colour, "u1") for colour in ("red", "green", "blue")]
    table = np.empty(len(place), dtype=fields)
    for axis, name in enumerate("xyz"):
        table[name] = place[:, axis]
    for channel, name in enumerate(("red", "green", "blue")):
        table[name] = shade[:, channel]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"property uchar {colour}" for colour in ("red", "green", "blue")]
    _write(path, ("\n".join([*header, "end_header"]) + "\n").encode() + table.tobytes())


def _write(path: str | Path, content: str | bytes) -> None:
    make_folder(Path(path).parent)
    write_whole(path, content)
