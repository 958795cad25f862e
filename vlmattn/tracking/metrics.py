"""How far a trajectory is from the truth: Umeyama alignment, ATE and RPE, as ``evo`` computes them (a test compares).

Trajectories are camera-to-world poses ``[n, 4, 4]``, NumPy arrays or tensors; everything is computed in float64.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vlmattn.errors import InputError, OptionError

Array = NDArray[np.float64]
Alignment = Literal["sim3", "se3", "none"]
FARTHEST = 1e100  # no length of a path; its square still has room for sums
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

    H = 1/n sum (y - mean y)(x - mean x)^T = U S V^T, D = diag(1, 1, sign det(U V^T)): R = U D V^T, s = tr(S D) /
    var(x).

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
    poses, real = checked_poses(estimate), checked_poses(truth)
    if align not in ("sim3", "se3", "none"):
        raise OptionError(f"align must be sim3, se3 or none, got '{align}'")
    if len(poses) != len(real):
        raise InputError(f"trajectories of {len(poses)} and {len(real)} poses; pair them by time with associate()")
    if not len(poses):
        raise InputError("there are no poses to compare")
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
    return Errors(np.linalg.norm(moved[:, :3, 3] - checked_poses(truth)[:, :3, 3], axis=1), "length")


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
    moved, real = aligned(estimate, truth, align), checked_poses(truth)
    if not isinstance(delta, (int, np.integer)) or not 1 <= delta < len(moved):
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
    """Indices of frames that belong together, as ``evo`` pairs them.

    Each frame of the shorter sequence (of ``others`` if both are as long) is taken once, in its order, with the nearest
    in time of the longer one, if that is at most ``most`` seconds away. So a sparse truth lends no pose to all the
    frames around it. Times may be unsorted and may repeat. A frame of the longer one can serve several of the shorter
    only where those lie denser.

    Raises:
        InputError: no two are that near, or there are no times.
        OptionError: ``most`` is negative or no number.
    """
    here, there = _times(times), _times(others)
    if not (isinstance(most, numbers.Real) and most >= 0):  # false for NaN too
        raise OptionError(f"most must be a number of seconds, 0 or more, got {most!r}")
    shorter, longer = (here, there) if len(here) < len(there) else (there, here)
    nearest = _nearest(shorter, longer)
    near = np.abs(longer[nearest] - shorter) <= most
    if not near.any():
        raise InputError(f"no two time stamps are within {most} s; do both count from the same moment?")
    taken, matched = np.flatnonzero(near), nearest[near]
    return (taken, matched) if shorter is here else (matched, taken)


def _nearest(wanted: Array, times: Array) -> NDArray[np.intp]:
    """Index of the nearest of ``times`` for each that is ``wanted``; never a table of all pairs.

    Ties as in ``evo``. Ascending times: the earlier; of equal times the last, or the last but one where no later time
    follows.
    Other times: whichever comes first in the sequence.
    """
    order = np.argsort(times, kind="stable")
    ascending = times[order]
    after = np.searchsorted(ascending, wanted, side="right").clip(1, max(len(times) - 1, 1))
    before, after = after - 1, np.minimum(after, len(times) - 1)
    if (order[1:] > order[:-1]).all():
        return np.where(wanted - ascending[before] <= ascending[after] - wanted, before, after)
    left, right = (order[np.searchsorted(ascending, ascending[place], side="left")] for place in (before, after))
    away, gap = np.abs(wanted - times[left]), np.abs(wanted - times[right])
    nearest: NDArray[np.intp] = np.where((away < gap) | ((away == gap) & (left < right)), left, right)
    return nearest


def _inverse(poses: Array) -> Array:
    """Of rigid motions: the rotation transposed."""
    inverse = np.zeros_like(poses)
    inverse[:, :3, :3] = poses[:, :3, :3].transpose(0, 2, 1)
    inverse[:, :3, 3:] = -inverse[:, :3, :3] @ poses[:, :3, 3:]
    inverse[:, 3, 3] = 1
    return inverse


def _points(values: Any) -> Array:
    points = numbers_of(values, "points")
    if points.ndim != 2 or points.shape[1] != 3:
        raise InputError(f"points must be [n, 3], got {list(points.shape)}")
    return points


def checked_poses(values: Any) -> Array:
    """Poses ``[n, 4, 4]`` of a caller; raises as ``numbers_of``, and for other shapes."""
    poses = numbers_of(values, "poses")
    if poses.ndim != 3 or poses.shape[1:] != (4, 4):
        raise InputError(f"poses must be [n, 4, 4], got {list(poses.shape)}")
    return poses


def _times(values: Any) -> Array:
    times = numbers_of(values, "times")
    if times.ndim != 1 or not len(times):
        raise InputError(f"times must be [n] with n of 1 or more, got {list(times.shape)}")
    return times


def numbers_of(values: Any, what: str) -> Array:
    """Finite numbers of a caller in float64: of arrays, lists, tensors of any precision and on any device.

    Raises:
        InputError: something else, NaN, infinity, or beyond ``FARTHEST``.
    """
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            values = values.double() if values.is_floating_point() else values
        found = np.asarray(values)
        if found.dtype.kind not in "fiu":
            raise TypeError
        found = found.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor without values
        raise InputError(f"{what} must be an array or a tensor of real numbers, got {type(values).__name__}") from None
    if not np.isfinite(found).all():
        raise InputError(f"{what} hold NaN or infinity")
    if np.abs(found).max(initial=0.0) > FARTHEST:
        raise InputError(
            f"{what} hold {np.abs(found).max():g}; numbers beyond {FARTHEST:g} cannot be squared and summed"
        )
    return found
