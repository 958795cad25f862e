"""How far a trajectory is from the truth: Umeyama alignment, ATE and RPE, as ``evo`` computes them (a test compares).

Trajectories are camera-to-world poses ``[n, 4, 4]``, NumPy arrays or tensors; everything is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlmattn.errors import InputError, OptionError

Array = NDArray[np.float64]
Alignment = Literal["sim3", "se3", "none"]
_FLAT = 1e-7  # singular values below this part of the largest: a straight line


@dataclass(frozen=True)
class Errors:
    """Errors of poses, or of pairs of poses.

    Attributes:
        values: ``[n]``, in the unit of the truth, or degrees.
        unit: "length" or "degrees".
    """

    values: Array
    unit: str

    @property
    def rmse(self) -> float:
        return float(np.sqrt(np.mean(self.values**2)))

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def max(self) -> float:
        return float(self.values.max())


def umeyama(source: Any, target: Any, scale: bool = True) -> tuple[float, Array, Array]:
    """Scale s, rotation R and translation t that minimise ``sum |s R x + t - y|^2``.

    H = 1/n sum (y - mean y)(x - mean x)^T = U S V^T, D = diag(1, 1, sign det(U V^T)): R = U D V^T, s = tr(S D) / var(x).

    Args:
        source, target: points ``[n, 3]``, paired.
        scale: fit s too (Sim3); False: s = 1 (SE3).

    Raises:
        InputError: fewer than three pairs, not finite, or all points on a line or in one place (the rotation about the
            line is then free).

    Umeyama 1991, https://doi.org/10.1109/34.88573
    """
    x, y = _points(source), _points(target)
    if x.shape != y.shape:
        raise InputError(f"paired points are needed, got {len(x)} and {len(y)}; pair them by time with associate()")
    if len(x) < 3:
        raise InputError(f"an alignment needs 3 points or more, got {len(x)}")
    mean_x, mean_y = x.mean(0), y.mean(0)
    u, singular, vt = np.linalg.svd((y - mean_y).T @ (x - mean_x) / len(x))
    if singular[1] <= max(_FLAT * singular[0], np.finfo(np.float64).tiny):
        raise InputError(
            "the camera centres lie on a straight line or in one place, which leaves the rotation of an alignment free;"
            " take a path with a turn, or compare without alignment (align='none')"
        )
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    turn = (u * sign) @ vt
    size = float(singular @ sign / np.square(x - mean_x).sum(1).mean()) if scale else 1.0
    return size, turn, mean_y - size * turn @ mean_x


def aligned(estimate: Any, truth: Any, align: Alignment = "sim3") -> Array:
    """``estimate`` moved as one piece onto ``truth``: camera centres by ``umeyama``, orientations turned along."""
    poses, real = _poses(estimate), _poses(truth)
    if align not in ("sim3", "se3", "none"):
        raise OptionError(f"align must be sim3, se3 or none, got '{align}'")
    if len(poses) != len(real):
        raise InputError(f"trajectories of {len(poses)} and {len(real)} poses; pair them by time with associate()")
    if align == "none":
        return poses
    size, turn, shift = umeyama(poses[:, :3, 3], real[:, :3, 3], align == "sim3")
    moved: Array = poses.copy()
    moved[:, :3, :3] = turn @ poses[:, :3, :3]
    moved[:, :3, 3] = size * poses[:, :3, 3] @ turn.T + shift
    return moved


def ate(estimate: Any, truth: Any, align: Alignment = "sim3") -> Errors:
    """Absolute trajectory error: distances of the camera centres after one alignment of the whole trajectory.

    Args:
        estimate, truth: camera-to-world poses ``[n, 4, 4]``, paired.
        align: "sim3" (networks whose unit is free), "se3", or "none".
    """
    moved = aligned(estimate, truth, align)
    return Errors(np.linalg.norm(moved[:, :3, 3] - _poses(truth)[:, :3, 3], axis=1), "length")


def rpe(
    estimate: Any,
    truth: Any,
    delta: int = 1,
    part: Literal["translation", "rotation"] = "translation",
    align: Alignment = "sim3",
    every_pair: bool = False,
) -> Errors:
    """Relative pose error: E_i = (G_i^-1 G_j)^-1 (P_i^-1 P_j), j = i + delta, after one alignment.

    Args:
        delta: frames between the poses of a pair.
        part: "translation" (length of E's translation) or "rotation" (its angle in degrees).
        every_pair: pairs from every i; False: end to end, i = 0, delta, 2 delta, ...

    Raises:
        InputError: no pair is that far apart.
    """
    if part not in ("translation", "rotation"):
        raise OptionError(f"part must be translation or rotation, got '{part}'")
    moved, real = aligned(estimate, truth, align), _poses(truth)
    if not 1 <= delta < len(moved):
        raise InputError(f"delta must be 1 to {len(moved) - 1} for {len(moved)} poses, got {delta}")
    first = np.arange(0, len(moved) - delta, 1 if every_pair else delta)
    told, was = (_inverse(poses[first]) @ poses[first + delta] for poses in (moved, real))
    error = _inverse(was) @ told
    if part == "translation":
        return Errors(np.linalg.norm(error[:, :3, 3], axis=1), "length")
    return Errors(angles(error), "degrees")


def angles(poses: Array) -> Array:
    """Angles of rotation in degrees, ``[...]`` of ``[..., 4, 4]``."""
    turn = poses[..., :3, :3]
    skew = np.stack(
        [turn[..., 2, 1] - turn[..., 1, 2], turn[..., 0, 2] - turn[..., 2, 0], turn[..., 1, 0] - turn[..., 0, 1]], -1
    )
    sine = np.linalg.norm(skew, axis=-1) / 2  # exact for small angles, where the cosine is flat
    cosine = (np.trace(turn, axis1=-2, axis2=-1) - 1) / 2
    return np.asarray(np.degrees(np.arctan2(sine, cosine)), dtype=np.float64)


def associate(times: Any, others: Any, most: float = 0.02) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of frames that belong together: each of ``times`` with the nearest of ``others``, at most ``most`` seconds away.

    Raises:
        InputError: no two are that near.
    """
    here, there = np.asarray(times, np.float64), np.asarray(others, np.float64)
    nearest = np.abs(here[:, None] - there[None]).argmin(1)
    near = np.abs(here - there[nearest]) <= most
    if not near.any():
        raise InputError(f"no two time stamps are within {most} s; do both count from the same moment?")
    return np.flatnonzero(near), nearest[near]


def _inverse(poses: Array) -> Array:
    """Of rigid motions: the rotation transposed."""
    inverse = np.zeros_like(poses)
    inverse[:, :3, :3] = poses[:, :3, :3].transpose(0, 2, 1)
    inverse[:, :3, 3:] = -inverse[:, :3, :3] @ poses[:, :3, 3:]
    inverse[:, 3, 3] = 1
    return inverse


def _points(values: Any) -> Array:
    points = np.asarray(values, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise InputError(f"points must be [n, 3], got {list(points.shape)}")
    if not np.isfinite(points).all():
        raise InputError("points hold NaN or infinity")
    return points


def _poses(values: Any) -> Array:
    poses = np.asarray(values, dtype=np.float64)
    if poses.ndim != 3 or poses.shape[1:] != (4, 4):
        raise InputError(f"poses must be [n, 4, 4], got {list(poses.shape)}")
    if not np.isfinite(poses).all():
        raise InputError("poses hold NaN or infinity")
    return poses
