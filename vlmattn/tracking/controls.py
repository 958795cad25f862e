"""Does tracking use the map? The same frames against the right map, another room's map, no map, and not tracked at all.

An alignment in Sim(3) has seven degrees of freedom and forgives much: an untrained network scores better than a camera
that stands still. So errors are only told beside these controls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vlmattn.tracking import metrics
from vlmattn.tracking.gauge import align
from vlmattn.tracking.metrics import Array
from vlmattn.tracking.rooms import make_rooms, render, smooth_poses
from vlmattn.tracking.tracker import Tracker

HELD_OUT = 20_000  # seeds of rooms from here on are never trained on


@dataclass(frozen=True)
class Walk:
    """A camera's walk through a room.

    Attributes:
        images: ``[frames, 3, height, width]``.
        poses: the truth, camera to world, ``[frames, 4, 4]`` float64.
    """

    images: Tensor
    poses: Array


def held_out_walk(number: int, frames: int = 60, size: int = 48) -> Walk:
    """The ``number``-th walk that training never saw."""
    draw = torch.Generator().manual_seed(HELD_OUT + number)
    rooms = make_rooms(1, draw)
    poses = smooth_poses(rooms, frames, draw)
    images, _ = render(rooms, poses, size)
    return Walk(images[0], poses[0].double().numpy())


@dataclass(frozen=True)
class Score:
    """Errors of one way of tracking.

    Attributes:
        ate: RMSE of the camera centres after a Sim(3) alignment.
        ate_rigid: after a rigid one.
        rpe: RMSE of the steps from one tracked frame to the next, after Sim(3); rpe_degrees: their turns.
        yaw: mean error of the heading in degrees, after the constant rotation that fits all orientations best.
    """

    ate: float
    ate_rigid: float
    rpe: float
    rpe_degrees: float
    yaw: float


def score(told: Array, truth: Array) -> Score:
    """All errors of paired poses ``[n, 4, 4]``; one that never moves is scored at the mean of the truth."""
    told = _at_rest(told, truth)
    moved = np.array(told)
    moved[:, :3, :3] = align(torch.from_numpy(told), torch.from_numpy(truth)).rotation.numpy() @ told[:, :3, :3]
    aside = _heading(moved) - _heading(truth)
    still = np.ptp(told[:, :3, 3], axis=0).max() < 1e-9
    way: metrics.Alignment = "none" if still else "sim3"
    rigid: metrics.Alignment = "none" if still else "se3"
    return Score(
        ate=metrics.ate(told, truth, way).rmse,
        ate_rigid=metrics.ate(told, truth, rigid).rmse,
        rpe=metrics.rpe(told, truth, align=way).rmse,
        rpe_degrees=metrics.rpe(told, truth, part="rotation", align=way).rmse,
        yaw=float(np.degrees(np.abs((aside + np.pi) % (2 * np.pi) - np.pi)).mean()),
    )


def _at_rest(told: Array, truth: Array) -> Array:
    """A camera that never moves put where it is least wrong, which is all that an alignment could do for it."""
    if np.ptp(told[:, :3, 3], axis=0).max() > 1e-9:
        return told
    rest = np.array(told)
    rest[:, :3, 3] = truth[:, :3, 3].mean(0)
    return rest


def _heading(poses: Array) -> Array:
    """Azimuth of the optical axis, radians."""
    return np.asarray(np.arctan2(poses[:, 0, 2], poses[:, 2, 2]))


def make_map(network: nn.Module, images: Tensor, keyframes: Sequence[int]) -> Tracker:
    """A tracker with exactly these keyframes, mapped in one pass."""
    tracker = Tracker(network, max_keyframes=max(2, len(keyframes)))
    tracker.make_map(images[list(keyframes)])
    return tracker


def compare(
    network: nn.Module,
    walk: Walk,
    other: Walk,
    keyframes: Sequence[int],
    frames: Sequence[int],
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Array]:
    """Poses of ``frames`` by each way of tracking, ``[n, 4, 4]``.

    Args:
        other: a walk through another room, whose map is the wrong one.
        keyframes: frames of the map (of both walks).
        tick: called after every frame of the full pass of keyframes and frame. Its own world is brought onto the map's
            by its keyframes, else the passes' worlds would count as its errors.
    """
    tracker = make_map(network, walk.images, keyframes)
    wrong = make_map(network, other.images, keyframes)
    query = walk.images[list(frames)]
    found = {"cached": tracker.track(query).pose, "wrong map": wrong.track(query).pose}
    adapter = tracker.adapter
    assert tracker.map is not None
    poses = []
    with torch.no_grad():
        for frame in query:
            every = adapter.forward(torch.cat([tracker.map.images, frame[None]])[None], reading=False).poses[0]
            poses.append(align(every[:-1], tracker.map.poses).poses(every[-1].double()))
            tick()
        found["full"] = torch.stack(poses)
        found["no map"] = adapter.forward(query[:, None], reading=True).poses[:, 0].double()
    found["standing still"] = torch.eye(4, dtype=torch.float64).expand(len(query), 4, 4)
    return {name: poses.cpu().numpy() for name, poses in found.items()}
