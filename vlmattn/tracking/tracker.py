"""Track a camera against the keys and values of a map (KV-Tracker, arXiv 2512.22581).

Mapping runs the multi-view network on all keyframes together and keeps, for every attention across frames, the keys and
values of all their tokens. Tracking runs the network on one frame alone; in those attentions the frame sees the map and
itself, and the map sees nothing new. So a frame costs O(M^2 (N + 1)) instead of O((N M)^2), N keyframes of M tokens,
and equals the full pass in which the keyframes do not see the frame.
"""

from __future__ import annotations

import numbers
import threading
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmattn.errors import InputError, OptionError, StateError
from vlmattn.tracking.files import Trajectory, write_ply, write_tum
from vlmattn.tracking.keyframes import Rule, Sight, check_whole, find_rule
from vlmattn.tracking.maps import Map, Mapper, in_world, joined, mean
from vlmattn.tracking.metrics import numbers_of
from vlmattn.tracking.models import Adapter, find_adapter
from vlmattn.tracking.passes import Read

# KV-Tracker's constants, in shares of the first map's confidence.
_ACCEPT = 0.6  # a keyframe below is refused; its code has that for objects only, and switched off
_POINTS = 1.15 * _ACCEPT  # points above go into the cloud
_LOST = 0.3 * _ACCEPT  # a tracked frame below is lost


@dataclass(frozen=True)
class Track:
    """Where the camera of a frame is. With a batch of frames every tensor begins with ``[batch]``.

    Attributes:
        pose: camera to world, OpenCV axes, ``[4, 4]``. The world is the camera of the first keyframe, in the unit of
            the first map.
        confidence: mean over the pixels (of the object), in the network's measure, ``[]``; None if it has none.
        points: of the pixels in the world, ``[height, width, 3]``; None if the network has none.
        lost: bool ``[]``: the confidence is below 0.18 of the first map's, or the pose is not finite. ``follow`` then
            holds the last pose.
        map_version: of the map that was used; 1 for the first.
        keyframe: whether ``follow`` made this frame a keyframe.
    """

    pose: Tensor
    confidence: Tensor | None
    points: Tensor | None
    lost: Tensor
    map_version: int
    keyframe: bool = False


@dataclass(frozen=True)
class Mapped:
    """What came of a keyframe.

    Attributes:
        accepted: it is part of the map (or waits for the second one).
        version: of the map in use; 0: none yet.
        reason: why it was refused; empty if it was not.
    """

    accepted: bool
    version: int
    reason: str = ""


class Tracker:
    """Track a camera in real time with a multi-view network, without training.

    >>> tracker = vlmattn.Tracker(model)
    >>> for image in frames:
    ...     pose = tracker.follow(image).pose          # chooses keyframes itself
    >>> tracker.save_tum("trajectory.txt")

    or, step by step, ``add_keyframe(image)`` and ``track(image)``, which changes nothing. The model is not modified.

    Args:
        model: a network after pi^3 or VGGT, in eval mode; ``vlmattn.tracking.load()`` gives the bundled one.
        adapter: how to run it: "auto", a name, or an ``Adapter``.
        rule: when ``follow`` takes a keyframe: "angular", "azel", "released", "interval", "pose", or one such as
            ``Angular(15)``.
        sim3: keep pose and unit of the world over re-mappings, by aligning the keyframes of each map with those before.
            KV-Tracker's code leaves this off, and jumps when it re-maps.
        cache_dtype: of stored keys and values, e.g. torch.bfloat16; None: as the network computes them.
        max_keyframes: 20 is KV-Tracker's for scenes. ``follow`` takes no more.
        min_gap: frames between keyframes that ``follow`` takes, at least.
        drop_masked_tokens: in object mode, keep no keys and values of patches that lie off the object. They are always
            blackened (as KV-Tracker does); this also saves their memory, and is experimental.

    Raises:
        UnsupportedError: no adapter fits the model.
        UnknownNameError: no adapter or rule of this name.
        OptionError: a number or a type that cannot be.
        StateError: the model is in training mode.

    KV-Tracker, https://arxiv.org/abs/2512.22581. Where its paper and code differ, ``docs/tracking.md`` says what is
    done here.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str | Adapter = "auto",
        rule: str | Rule = "angular",
        sim3: bool = True,
        *,
        cache_dtype: torch.dtype | None = None,
        max_keyframes: int = 20,
        min_gap: int = 1,
        drop_masked_tokens: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"the model must be a torch module, got {type(model).__name__}")
        check_whole("max_keyframes", max_keyframes, 2)
        check_whole("min_gap", min_gap, 1)
        if cache_dtype is not None and not (isinstance(cache_dtype, torch.dtype) and cache_dtype.is_floating_point):
            raise OptionError(f"cache_dtype must be a floating-point dtype such as torch.bfloat16, got {cache_dtype!r}")
        self.model, self.adapter = model, find_adapter(model, adapter)
        self.rule = find_rule(rule)
        self.max_keyframes, self.min_gap = max_keyframes, min_gap
        self._mapper = Mapper(self.adapter, model, sim3, cache_dtype, drop_masked_tokens)
        self._mapping = threading.Lock()
        self._warned = self._warned_of_time = False
        self.reset()

    def reset(self) -> None:
        """Forget map and trajectory."""
        self._map: Map | None = None
        self._first: tuple[Tensor, Tensor | None] | None = None  # images and masks of one keyframe that waits
        self._forget_path()

    def _forget_path(self) -> None:
        self._last: Track | None = None
        self._since = 0
        self._times: list[float] = []
        self._poses: list[Tensor] = []

    @property
    def map(self) -> Map | None:
        """The map in use."""
        return self._map

    @property
    def keyframes(self) -> int:
        """How many keyframes there are."""
        return int(self._first is not None) if self._map is None else len(self._map.images)

    def add_keyframe(self, image: Any, mask: Any = None) -> Mapped:
        """Add a keyframe and make the map anew; the old one stays in use until the new one is done, or if it fails.

        Args:
            image: PIL image, path, uint8 ``[height, width, 3]`` or float ``[3, height, width]`` in [0, 1]. All
                keyframes have one size, whole multiples of the patch.
            mask: of the object, ``[height, width]``; the rest is blackened. For all keyframes or for none.

        Returns:
            whether it was accepted: the confidence of the new keyframe must be at least 0.6 of the first map's.

        Raises:
            InputError: sizes, NaN, masks.
            StateError: the map is full, or the network returned NaN. The map is as it was.
        """
        frame, where = self._mapper.frame(image, mask, self._mapper.state())
        if frame.dim() != 3:
            raise InputError(f"add_keyframe takes one frame, got {list(frame.shape)}; call it for each")
        with self._mapping:
            if self.keyframes >= self.max_keyframes:
                raise StateError(
                    f"the map is full: {self.keyframes} keyframes; make the tracker with more max_keyframes"
                )
            if self._map is None and self._first is None:
                self._first = frame[None], None if where is None else where[None]
                return Mapped(True, 0)
            old = self._map
            others = self._first if old is None else (old.images, old.masks)
            assert others is not None
            made = self._mapper.make(*joined(*others, frame, where), old)
            if made.usual is not None and made.confidence is not None:
                sure = mean(made.confidence[-1:], None if made.masks is None else made.masks[-1:])
                if bool(sure < _ACCEPT * made.usual):
                    usual = f"{_ACCEPT} of the first map's {float(made.usual):.3f}"
                    reason = f"its confidence is {float(sure):.3f}, below {usual}"
                    return Mapped(False, 0 if old is None else old.version, reason)
            self._map, self._first = made, None
            return Mapped(True, made.version)

    def make_map(self, images: Any, masks: Any = None) -> Mapped:
        """Make a map of these keyframes in one pass, in place of any map and trajectory there is.

        Args:
            images: a batch of frames ``[n, 3, height, width]`` (or uint8 ``[n, height, width, 3]``), two or more.
            masks: ``[n, height, width]`` in object mode.

        Raises:
            InputError: fewer than two, sizes, NaN, masks.
            StateError: more than ``max_keyframes``, or the network returned NaN. All is then as it was.
        """
        frames, where = self._mapper.frame(images, masks, self._mapper.state())
        if frames.dim() != 4 or len(frames) < 2:
            raise InputError(f"a map needs a batch of two keyframes or more, got {list(frames.shape)}")
        with self._mapping:
            if len(frames) > self.max_keyframes:
                raise StateError(f"{len(frames)} keyframes are more than max_keyframes = {self.max_keyframes}")
            made = self._mapper.make(frames, where, None)
            self._map, self._first = made, None
            self._forget_path()
            return Mapped(True, made.version)

    def remap(self) -> None:
        """Make the map anew from its keyframes, after the model was changed.

        Raises:
            StateError: there is no map, or the network returned NaN.
        """
        with self._mapping:
            if self._map is None:
                raise StateError("there is no map; call add_keyframe() with two frames, or follow()")
            now = self._mapper.state()
            masks = None if self._map.masks is None else self._map.masks.to(now.device)
            self._map = self._mapper.make(self._map.images.to(now.device, now.dtype), masks, self._map)

    def track(self, image: Any, mask: Any = None) -> Track:
        """Where the camera is, against the map. Changes nothing, so threads may share a tracker.

        Args:
            image: a frame as for ``add_keyframe``, or a batch of them, ``[batch, 3, height, width]``. A size other than
                the keyframes' works, with a warning.
            mask: of the object, ``[height, width]`` or ``[batch, height, width]``; the rest is blackened.

        Raises:
            InputError: sizes, NaN, masks.
            StateError: fewer than two keyframes, or the model has changed since.
        """
        using = self._map
        if using is None:
            raise StateError(
                f"a map needs two keyframes, there {'is 1' if self.keyframes else 'are 0'}; add more with"
                " add_keyframe(), or call follow(), which begins by itself"
            )
        state = self._mapper.state()
        frame, where = self._mapper.frame(image, mask, state)
        self._note_size(frame, using)
        using.state.check(state)
        batch = frame if frame.dim() == 4 else frame[None]
        views = self._mapper.run(Read(using.cache), batch[:, None])
        pose = using.gauge.poses(views.poses[:, 0].double())
        lost = ~pose.isfinite().flatten(1).all(1)
        points, sure = None, None
        if views.local_points is not None:
            points = in_world(views.local_points[:, 0], pose, using.gauge.scale)
        if views.confidence is not None:
            sure = mean(views.confidence[:, 0], None if where is None else where.view(len(batch), *batch.shape[2:]))
            if using.usual is not None:
                lost = lost | ~(sure >= _LOST * using.usual)  # true for NaN too
        found = Track(pose, sure, points, lost, using.version)
        if frame.dim() == 4:
            return found
        first = {name: x[0] for name, x in vars(found).items() if isinstance(x, Tensor)}
        return replace(found, **first)  # type: ignore[arg-type]

    def _note_size(self, frame: Tensor, using: Map) -> None:
        """Warn once of frames of another size than the keyframes'."""
        if frame.shape[-2:] != using.images.shape[-2:] and not self._warned:
            self._warned = True
            sizes = [f"{height}x{width}" for height, width in (frame.shape[-2:], using.images.shape[-2:])]
            warnings.warn(
                f"this frame is {sizes[0]}, the keyframes are {sizes[1]}: it is tracked, but less well", stacklevel=3
            )

    def follow(self, image: Any, mask: Any = None, time: float | None = None) -> Track:
        """Track the next frame of a sequence and take it as a keyframe where the rule asks for one.

        The first frame makes a map with itself, seen twice, until the second keyframe comes. A lost frame holds the
        last pose.

        Args:
            image, mask: one frame, as for ``add_keyframe``.
            time: seconds, for the trajectory; default: the number of the frame. Times that do not go on are kept, with
                a warning.

        Raises:
            InputError: sizes, NaN, masks, a batch of frames, a time that is no number. Nothing has changed then.
            StateError: the model has changed since, or returned NaN for a keyframe.
        """
        seconds = self._seconds(time)
        begins = self._map is None and self._first is None
        if begins:
            self.add_keyframe(image, mask)
        if self._map is None:  # a map of the first frame alone, until the second keyframe comes
            with self._mapping:
                assert self._first is not None
                self._map, self._first = self._mapper.make(*self._first, None), None
        found = self.track(image, mask)
        assert self._map is not None
        if found.pose.dim() != 2:
            raise InputError(f"follow takes one frame, got a batch of {len(found.pose)}; call it for each")
        self._since += 1
        if bool(found.lost):
            found = self._held(found)
        elif begins or self._joins(found, image, mask):
            found = replace(found, pose=self._map.poses[-1], keyframe=True, map_version=self._map.version)
            self._since = 0
        self._last = found
        self._times.append(seconds)
        self._poses.append(found.pose)
        return found

    def _held(self, found: Track) -> Track:
        """A lost frame, with the last pose."""
        if self._last is not None:
            return replace(found, pose=self._last.pose)
        assert self._map is not None
        return found if bool(found.pose.isfinite().all()) else replace(found, pose=self._map.poses[0])

    def _joins(self, found: Track, image: Any, mask: Any) -> bool:
        """Whether the rule asks for this frame, and the map takes it."""
        if self.keyframes >= self.max_keyframes or self._since < self.min_gap:
            return False
        assert self._map is not None
        sight = Sight(found.pose, self._map.poses, self._map.centre, self._map.depth, self._since)
        return self.rule.wants(sight) and self.add_keyframe(image, mask).accepted

    def _seconds(self, time: Any) -> float:
        """The time of the next frame of ``follow``."""
        given = numbers_of(len(self._times) if time is None else time, "time")
        if given.ndim:
            raise InputError(f"time must be one number of seconds, got {list(given.shape)}")
        seconds = float(given)
        if self._times and seconds <= self._times[-1] and not self._warned_of_time:
            self._warned_of_time = True
            warnings.warn(
                f"this frame is at {seconds:g} s, the one before was at {self._times[-1]:g} s; both are kept as they"
                " are",
                stacklevel=3,
            )
        return seconds

    @property
    def trajectory(self) -> Trajectory:
        """Poses of the frames that ``follow`` has seen."""
        poses = torch.stack(self._poses).cpu().numpy() if self._poses else np.zeros((0, 4, 4))
        return Trajectory(np.array(self._times), poses)

    def save_tum(self, path: Any) -> None:
        """Write the trajectory of ``follow`` in the TUM format."""
        write_tum(path, self.trajectory)

    def point_cloud(self, min_confidence: float | None = None) -> tuple[Tensor, Tensor]:
        """The keyframes' points in the world and their colours, ``[n, 3]`` each.

        Args:
            min_confidence: leave out pixels below; default 0.69 of the first map's mean (KV-Tracker's constant).

        Raises:
            StateError: no map, or the network tells no points.
            OptionError: ``min_confidence`` is no number.
        """
        if min_confidence is not None and not (
            isinstance(min_confidence, numbers.Real) and min_confidence == min_confidence
        ):
            raise OptionError(f"min_confidence must be a number, got {min_confidence!r}")
        using = self._map
        if using is None or using.points is None:
            raise StateError("there are no points: " + ("no map yet" if using is None else "the network tells none"))
        take = using.points.isfinite().all(-1)
        if using.confidence is not None and using.usual is not None:
            take &= using.confidence >= (_POINTS * using.usual if min_confidence is None else min_confidence)
        if using.masks is not None:
            take &= using.masks
        return using.points[take], using.images.permute(0, 2, 3, 1)[take]

    def save_ply(self, path: Any, min_confidence: float | None = None) -> None:
        """Write ``point_cloud()`` as a PLY file."""
        points, colours = self.point_cloud(min_confidence)
        write_ply(path, points.cpu(), colours.float().cpu())
