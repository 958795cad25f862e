"""Track a camera against the keys and values of a map (KV-Tracker, arXiv 2512.22581).

Mapping runs the multi-view network on all keyframes together and keeps, for every attention across frames, the keys and
values of all their tokens. Tracking runs the network on one frame alone; in those attentions the frame sees the map and
itself, and the map sees nothing new. So a frame costs O(M^2 (N + 1)) instead of O((N M)^2), N keyframes of M tokens, and
equals the full pass in which the keyframes do not see the frame.
"""

from __future__ import annotations

import numbers
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.errors import InputError, OptionError, StateError, UnsupportedError
from vlmattn.tracking.files import Trajectory, write_ply, write_tum
from vlmattn.tracking.frames import to_mask, to_tensor
from vlmattn.tracking.gauge import Similarity, align
from vlmattn.tracking.keyframes import Rule, Sight, check_whole, find_rule
from vlmattn.tracking.metrics import numbers_of
from vlmattn.tracking.models import Adapter, Views, find_adapter
from vlmattn.tracking.passes import Cache, Read, Store, running

# KV-Tracker's constants, in shares of the first map's confidence.
_ACCEPT = 0.6  # a keyframe below is refused; its code has that for objects only, and switched off
_POINTS = 1.15 * _ACCEPT  # points above go into the cloud
_LOST = 0.3 * _ACCEPT  # a tracked frame below is lost


@dataclass(frozen=True)
class Track:
    """Where the camera of a frame is. With a batch of frames every tensor begins with ``[batch]``.

    Attributes:
        pose: camera to world, OpenCV axes, ``[4, 4]``. The world is the camera of the first keyframe, in the unit of the
            first map.
        confidence: mean over the pixels (of the object), in the network's measure, ``[]``; None if it has none.
        points: of the pixels in the world, ``[height, width, 3]``; None if the network has none.
        lost: bool ``[]``: the confidence is below 0.18 of the first map's, or the pose is not finite. ``follow`` then holds the last pose.
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


@dataclass(frozen=True)
class Map:
    """A map: made at once, never changed, replaced as a whole.

    Attributes:
        cache: keys and values of every attention across frames, ``[1, heads, tokens, dim]`` each.
        images: the keyframes as the network saw them, ``[n, 3, height, width]``.
        masks: bool ``[n, height, width]`` in object mode, else None.
        poses: of the keyframes in the world, ``[n, 4, 4]`` (float64).
        anchors: their poses when each first joined, which later maps are aligned to.
        points: in the world, ``[n, height, width, 3]``, or None.
        confidence: ``[n, height, width]``, or None.
        gauge: from the world of this map's pass to the tracker's.
        depth: mean depth, in the unit of the tracker's world, ``[]``.
        centre: of the object, ``[3]``, or None.
        usual: mean confidence of the first map, ``[]``, or None.
        version: 1 for the first map.
    """

    cache: Cache
    images: Tensor
    masks: Tensor | None
    poses: Tensor
    anchors: Tensor
    points: Tensor | None
    confidence: Tensor | None
    gauge: Similarity
    depth: Tensor
    centre: Tensor | None
    usual: Tensor | None
    version: int
    state: _State

    def on(self, device: torch.device) -> Map:
        """What the next map takes over, on a device to which the model may have been moved."""
        return replace(
            self,
            anchors=self.anchors.to(device),
            depth=self.depth.to(device),
            centre=None if self.centre is None else self.centre.to(device),
            usual=None if self.usual is None else self.usual.to(device),
        )

    @property
    def cache_bytes(self) -> int:
        """Size of the keys and values: 2 x attentions x tokens x width x bytes."""
        return sum(x.numel() * x.element_size() for pair in self.cache for x in pair)


@dataclass(frozen=True)
class _State:
    """What a map depends on: the model as it was when it was made."""

    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    weights: int

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> _State:
        """``modules``: those with parameters of their own; found once, since walking a network takes longer than a frame may."""
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        first = parameters[0]
        kind = first.device.type
        versions = hash(tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters))
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return cls(first.dtype, first.device, autocast, versions)

    def check(self, now: _State) -> None:
        if now == self:
            return
        for what in ("dtype", "device", "autocast"):
            if getattr(self, what) != getattr(now, what):
                change = f"its {what} was {getattr(self, what)} and is {getattr(now, what)}"
                break
        else:
            change = "its weights are others"
        raise StateError(f"the model changed after the map was made: {change}; call tracker.remap(), or change it back")


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
        rule: when ``follow`` takes a keyframe: "angular", "azel", "released", "interval", "pose", or one such as ``Angular(15)``.
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

    KV-Tracker, https://arxiv.org/abs/2512.22581. Where its paper and code differ, ``docs/tracking.md`` says what is done here.
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
        self.model = model
        self.adapter = find_adapter(model, adapter)
        self._modules = [
            module for module in model.modules() if any(p is not None for p in module._parameters.values())
        ]
        if not self._modules:
            raise UnsupportedError(f"{type(model).__name__} has no parameters, so there is no network to run")
        self.rule = find_rule(rule)
        self.sim3 = sim3
        self.cache_dtype = cache_dtype
        self.max_keyframes = max_keyframes
        self.min_gap = min_gap
        self.drop_masked_tokens = drop_masked_tokens
        self._mapping = threading.Lock()
        self._warned = self._warned_of_time = False
        self.reset()

    def reset(self) -> None:
        """Forget map and trajectory."""
        self._map: Map | None = None
        self._first: tuple[Tensor, Tensor | None] | None = None  # a keyframe that waits for the second
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
            image: PIL image, path, uint8 ``[height, width, 3]`` or float ``[3, height, width]`` in [0, 1]. All keyframes have
                one size, whole multiples of the patch.
            mask: of the object, ``[height, width]``; the rest is blackened. For all keyframes or for none.

        Returns:
            whether it was accepted: the confidence of the new keyframe must be at least 0.6 of the first map's.

        Raises:
            InputError: sizes, NaN, masks.
            StateError: the map is full, or the network returned NaN. The map is as it was.
        """
        frame, where = self._frame(image, mask, self._state())
        if frame.dim() != 3:
            raise InputError(f"add_keyframe takes one frame, got {list(frame.shape)}; call it for each")
        with self._mapping:
            if self.keyframes >= self.max_keyframes:
                raise StateError(
                    f"the map is full: {self.keyframes} keyframes; make the tracker with more max_keyframes"
                )
            if self._map is None and self._first is None:
                self._first = (frame, where)
                return Mapped(True, 0)
            images, masks = self._joined(frame, where)
            made = self._make(images, masks, self._map)
            old = self._map
            if made.usual is not None and made.confidence is not None:
                sure = _mean(made.confidence[-1:], None if masks is None else masks[-1:])
                if bool(sure < _ACCEPT * made.usual):
                    reason = f"its confidence is {float(sure):.3f}, below {_ACCEPT} of the first map's {float(made.usual):.3f}"
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
        frames, where = self._frame(images, masks, self._state())
        if frames.dim() != 4 or len(frames) < 2:
            raise InputError(f"a map needs a batch of two keyframes or more, got {list(frames.shape)}")
        with self._mapping:
            if len(frames) > self.max_keyframes:
                raise StateError(f"{len(frames)} keyframes are more than max_keyframes = {self.max_keyframes}")
            made = self._make(frames, where, None)
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
            now = self._state()
            masks = None if self._map.masks is None else self._map.masks.to(now.device)
            self._map = self._make(self._map.images.to(now.device, now.dtype), masks, self._map)

    def track(self, image: Any, mask: Any = None) -> Track:
        """Where the camera is, against the map. Changes nothing, so threads may share a tracker.

        Args:
            image: a frame as for ``add_keyframe``, or a batch of them, ``[batch, 3, height, width]``. A size other than the
                keyframes' works, with a warning.
            mask: of the object, ``[height, width]`` or ``[batch, height, width]``; the rest is blackened.

        Raises:
            InputError: sizes, NaN, masks.
            StateError: fewer than two keyframes, or the model has changed since.
        """
        using = self._map
        if using is None:
            raise StateError(
                f"a map needs two keyframes, there {'is 1' if self.keyframes else 'are 0'}; add more with add_keyframe(),"
                " or call follow(), which begins by itself"
            )
        state = self._state()
        frame, where = self._frame(image, mask, state)
        if frame.shape[-2:] != using.images.shape[-2:] and not self._warned:
            self._warned = True
            sizes = [f"{height}x{width}" for height, width in (frame.shape[-2:], using.images.shape[-2:])]
            warnings.warn(
                f"this frame is {sizes[0]}, the keyframes are {sizes[1]}: it is tracked, but less well", stacklevel=2
            )
        batch = frame if frame.dim() == 4 else frame[None]
        using.state.check(state)
        views = self._run(Read(using.cache), batch[:, None], reading=True)
        pose = using.gauge.poses(views.poses[:, 0].double())
        points, confidence = None, None
        if views.local_points is not None:
            points = _world(views.local_points[:, 0], pose, using.gauge.scale)
        if views.confidence is not None:
            confidence = _mean(
                views.confidence[:, 0], None if where is None else where.view(batch.shape[0], *batch.shape[2:])
            )
        lost = ~pose.isfinite().flatten(1).all(1)
        if confidence is not None and using.usual is not None:
            lost = lost | ~(confidence >= _LOST * using.usual)  # true for NaN too
        out = Track(pose, confidence, points, lost, using.version)
        if frame.dim() == 4:
            return out
        first = [None if x is None else x[0] for x in (out.confidence, out.points)]
        return replace(out, pose=pose[0], confidence=first[0], points=first[1], lost=lost[0])

    def follow(self, image: Any, mask: Any = None, time: float | None = None) -> Track:
        """Track the next frame of a sequence and take it as a keyframe where the rule asks for one.

        The first frame makes a map with itself, seen twice, until the second keyframe comes. A lost frame holds the last pose.

        Args:
            image, mask: one frame, as for ``add_keyframe``.
            time: seconds, for the trajectory; default: the number of the frame. Times that do not go on are kept, with a warning.

        Raises:
            InputError: sizes, NaN, masks, a batch of frames, a time that is no number. Nothing has changed then.
            StateError: the model has changed since, or returned NaN for a keyframe.
        """
        seconds = self._seconds(time)
        begins = self._map is None and self._first is None
        if begins:
            self.add_keyframe(image, mask)
        if self._map is None:
            self._alone()
        found = self.track(image, mask)
        assert self._map is not None
        if found.pose.dim() != 2:
            raise InputError(f"follow takes one frame, got a batch of {len(found.pose)}; call it for each")
        self._since += 1
        if bool(found.lost):
            if self._last is not None:
                found = replace(found, pose=self._last.pose)
            elif not bool(found.pose.isfinite().all()):
                found = replace(found, pose=self._map.poses[0])
        elif begins:
            found = replace(found, pose=self._map.poses[0], keyframe=True)
            self._since = 0
        elif self.keyframes < self.max_keyframes and self._since >= self.min_gap:
            sight = Sight(found.pose, self._map.poses, self._map.centre, self._map.depth, self._since)
            if self.rule.wants(sight) and self.add_keyframe(image, mask).accepted:
                found = replace(found, pose=self._map.poses[-1], keyframe=True, map_version=self._map.version)
                self._since = 0
        self._last = found
        self._times.append(seconds)
        self._poses.append(found.pose)
        return found

    def _seconds(self, time: Any) -> float:
        """The time of the next frame of ``follow``."""
        given = numbers_of(len(self._times) if time is None else time, "time")
        if given.ndim:
            raise InputError(f"time must be one number of seconds, got {list(given.shape)}")
        seconds = float(given)
        if self._times and seconds <= self._times[-1] and not self._warned_of_time:
            self._warned_of_time = True
            warnings.warn(
                f"this frame is at {seconds:g} s, the one before was at {self._times[-1]:g} s; both are kept as they are",
                stacklevel=3,
            )
        return seconds

    @property
    def trajectory(self) -> Trajectory:
        """Poses of the frames that ``follow`` has seen."""
        import numpy as np

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

    def _frame(self, image: Any, mask: Any, state: _State) -> tuple[Tensor, Tensor | None]:
        """A checked frame in the model's dtype and on its device, blackened off the object; and the mask."""
        frame = to_tensor(image)
        multiple = self.adapter.multiple
        height, width = frame.shape[-2:]
        if frame.dim() > 4 or frame.numel() == 0 or height % multiple or width % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise InputError(
                f"a frame is [3, height, width] with sides of whole patches of {multiple}; got {list(frame.shape)}, near is"
                f" {near[0]}x{near[1]} (vlmattn.tracking.fit resizes pictures)"
            )
        if self.model.training:
            raise StateError("the model is in training mode, where dropout changes the answers; call model.eval()")
        frame = frame.to(state.device, state.dtype)
        if mask is None:
            return frame, None
        where = to_mask(mask, (*frame.shape[:-3], height, width)).to(state.device)
        return frame * where.unsqueeze(-3), where

    def _joined(self, frame: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All keyframes and this one."""
        if self._map is not None:
            images, masks = self._map.images, self._map.masks
        else:
            assert self._first is not None
            images, masks = self._first[0][None], None if self._first[1] is None else self._first[1][None]
        if frame.shape[-2:] != images.shape[-2:]:
            sizes = [f"{height}x{width}" for height, width in (frame.shape[-2:], images.shape[-2:])]
            raise InputError(
                f"keyframes are of one size: this is {sizes[0]}, the others are {sizes[1]}; resize it first"
            )
        if (where is None) != (masks is None):
            raise InputError(
                "either all keyframes have a mask or none; "
                + ("this one has none" if where is None else "the others have none")
            )
        joined = torch.cat([images.to(frame), frame[None]])
        return joined, None if where is None or masks is None else torch.cat([masks, where[None]])

    def _alone(self) -> None:
        """A map of the first frame, seen twice (KV-Tracker's beginning)."""
        with self._mapping:
            assert self._first is not None
            frame, where = self._first
            self._map = self._make(frame[None], None if where is None else where[None], None)
            self._first = None

    def _make(self, images: Tensor, masks: Tensor | None, old: Map | None) -> Map:
        """Run the network on all keyframes; the world of the result is that of the ``old`` map, if there is one."""
        count = len(images)
        seen = images if count > 1 else images.repeat(2, 1, 1, 1)
        store = Store(self.cache_dtype, self._kept_tokens(images, masks))
        views = self._run(store, seen[None], reading=False)
        poses = views.poses[0, :count].double()
        if not bool(poses.isfinite().all()):
            raise StateError("the network returned NaN for the keyframes; the map is as it was")
        local = None if views.local_points is None else views.local_points[0, :count]
        depth = poses.new_ones(()) if local is None else _mean(local[..., 2], masks).mean().double()
        old = None if old is None else old.on(poses.device)
        common = 0 if old is None else min(count, len(old.poses))
        if old is None or not self.sim3:
            gauge = Similarity.to_camera(poses[0])
        else:
            before = old.depth if local is not None else None
            gauge = align(poses[:common], old.anchors[:common], None if before is None else before / depth, depth)
        world = gauge.poses(poses)
        points = None if local is None else _world(local, world, gauge.scale)
        confidence = None if views.confidence is None else views.confidence[0, :count]
        usual = None if confidence is None else _mean(confidence, masks).mean()
        centre = None if old is None else old.centre
        if old is None and masks is not None and points is not None:
            centre = points[masks].mean(0).double()
        return Map(
            cache=store.cache,
            images=images,
            masks=masks,
            poses=world,
            anchors=world if old is None else torch.cat([old.anchors[:common], world[common:]]),
            points=points,
            confidence=confidence,
            gauge=gauge,
            depth=depth * gauge.scale,
            centre=centre,
            usual=usual if old is None else old.usual,
            version=1 if old is None else old.version + 1,
            state=self._state(),
        )

    def _state(self) -> _State:
        return _State.of(self._modules)

    def _run(self, this: Store | Read, images: Tensor, reading: bool) -> Views:
        with torch.no_grad(), running(this, self.adapter.attentions()):
            return self.adapter.forward(images, reading)

    def _kept_tokens(self, images: Tensor, masks: Tensor | None) -> Tensor | None:
        """bool ``[tokens of all keyframes]``: those whose keys and values are kept; None = all."""
        if masks is None or not self.drop_masked_tokens:
            return None
        patch = self.adapter.multiple
        on = torch.nn.functional.max_pool2d(masks[:, None].float(), patch)[:, 0].flatten(1) > 0
        lead = on.new_ones(len(on), self.adapter.lead)
        kept = torch.cat([lead, on], 1)
        return (kept if len(images) > 1 else kept.repeat(2, 1)).flatten()


def _world(local: Tensor, poses: Tensor, scale: Tensor) -> Tensor:
    """Points of the cameras ``[n, height, width, 3]``, in the unit of their pass, in the world."""
    turn, centre = poses[:, None, :3, :3].to(local.dtype), poses[:, None, None, :3, 3].to(local.dtype)
    return scale.to(local.dtype) * local @ turn.transpose(-1, -2) + centre


def _mean(values: Tensor, masks: Tensor | None) -> Tensor:
    """Mean over the pixels (of the object) of each frame, ``[frames]``."""
    values = values.float()
    if masks is None:
        return values.flatten(1).mean(1)
    return (values * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp_min(1)
