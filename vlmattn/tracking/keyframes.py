"""When a tracked frame should become a keyframe. One rule is one frozen dataclass; angles in degrees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vlmattn.errors import OptionError, UnknownNameError


@dataclass(frozen=True)
class Sight:
    """What a rule may look at. Poses are camera to world, in the world of the map.

    Attributes:
        pose: of the frame, ``[4, 4]``.
        keyframes: ``[n, 4, 4]``.
        centre: of the object in object mode, ``[3]``; None in a scene.
        depth: mean depth of the map, ``[]``.
        since: frames since the last keyframe.
    """

    pose: Tensor
    keyframes: Tensor
    centre: Tensor | None
    depth: Tensor
    since: int


class Rule(ABC):
    """A keyframe rule."""

    name: ClassVar[str]

    @abstractmethod
    def wants(self, sight: Sight) -> bool:
        """Whether this frame should join the map."""


@dataclass(frozen=True)
class _OfAngle(Rule):
    """A rule with an angle."""

    degrees: float = 10.0  # KV-Tracker's, for objects

    def __post_init__(self) -> None:
        _positive("degrees", self.degrees, 180)


@dataclass(frozen=True)
class Angular(_OfAngle):
    """No keyframe looks from within ``degrees``: min over keyframes of the angle between directions of view > degrees.

    The direction of view is, around an object, that from its centre to the camera; in a scene the optical axis.
    """

    name: ClassVar[str] = "angular"

    def wants(self, sight: Sight) -> bool:
        here, there = _direction(sight.pose, sight), _direction(sight.keyframes, sight)
        return bool(_degrees((there * here).sum(-1)).min() > self.degrees)


@dataclass(frozen=True)
class Azel(_OfAngle):
    """KV-Tracker's paper: the least azimuth or elevation difference to a keyframe exceeds ``degrees``.

    azimuth = atan2(x, z), elevation = atan2(y, hypot(x, z)) of the direction of view, in the world of the map. The
    minima are taken one by one, so a combination of both may stay uncovered; ``angular`` has no such gap.
    """

    name: ClassVar[str] = "azel"

    def wants(self, sight: Sight) -> bool:
        here, there = _azel(_direction(sight.pose, sight)), _azel(_direction(sight.keyframes, sight))
        away = torch.remainder(there - here + torch.pi, 2 * torch.pi) - torch.pi
        return bool((torch.rad2deg(away.abs()).amin(0) > self.degrees).any())


@dataclass(frozen=True)
class Released(_OfAngle):
    """KV-Tracker's code, where it watches an object: as ``azel``, with the angles as they are computed there.

    azimuth = asin(x / z), its argument cut to [-1, 1]; elevation = atan2(y, z), of the direction from the object's
    centre to the camera. Beyond 45 degrees the azimuth stands still, and elevations on both sides of 180 degrees count
    as far apart. In scenes the code asks for a keyframe every 50 frames instead (``interval``); here the optical axis
    is taken.
    """

    name: ClassVar[str] = "released"

    def wants(self, sight: Sight) -> bool:
        here, there = _released(_direction(sight.pose, sight)), _released(_direction(sight.keyframes, sight))
        return bool((torch.rad2deg((there - here).abs()).amin(0) > self.degrees).any())


@dataclass(frozen=True)
class Interval(Rule):
    """Every ``frames``-th frame (KV-Tracker's rule for scenes)."""

    frames: int = 50
    name: ClassVar[str] = "interval"

    def __post_init__(self) -> None:
        check_whole("frames", self.frames, 1)

    def wants(self, sight: Sight) -> bool:
        return sight.since >= self.frames


@dataclass(frozen=True)
class PoseChange(_OfAngle):
    """Every keyframe is turned by more than ``degrees`` or moved by more than ``distance`` mean depths."""

    distance: float = 0.15
    name: ClassVar[str] = "pose"

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("distance", self.distance, torch.inf)

    def wants(self, sight: Sight) -> bool:
        turn = (sight.keyframes[:, :3, :3] * sight.pose[:3, :3]).sum((-1, -2))
        turned = _degrees((turn - 1) / 2) > self.degrees
        moved = (sight.keyframes[:, :3, 3] - sight.pose[:3, 3]).norm(dim=-1) > self.distance * sight.depth
        return bool((turned | moved).all())


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Angular, Azel, Released, Interval, PoseChange)}


def find_rule(rule: str | Rule) -> Rule:
    """A rule by name, with its defaults.

    Raises:
        UnknownNameError: no such rule.
        OptionError: neither a name nor a rule.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise OptionError(f"rule must be a name ({', '.join(RULES)}) or a tracking.Rule, got {type(rule).__name__}")
    if rule not in RULES:
        raise UnknownNameError("keyframe rule", rule, RULES)
    return RULES[rule]()


def check_whole(name: str, value: Any, least: int) -> None:
    """
    Raises:
        OptionError: no whole number, or below ``least``.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name} must be at least {least} and a whole number, got {value!r}")


def _positive(name: str, value: Any, most: float) -> None:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not (number and 0 < value <= most):  # false for NaN
        raise OptionError(f"{name} must be above 0 and at most {most:g}, got {value!r}")


def _direction(poses: Tensor, sight: Sight) -> Tensor:
    if sight.centre is None:
        return poses[..., :3, 2]
    return torch.nn.functional.normalize(poses[..., :3, 3] - sight.centre, dim=-1)


def _degrees(cosine: Tensor) -> Tensor:
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))


def _azel(direction: Tensor) -> Tensor:
    x, y, z = direction.unbind(-1)
    return torch.stack([torch.atan2(x, z), torch.atan2(y, torch.hypot(x, z))], -1)


def _released(direction: Tensor) -> Tensor:
    x, y, z = direction.unbind(-1)
    return torch.stack([torch.asin((x / z).clamp(-1, 1)), torch.atan2(y, z)], -1)
