"""Maps of keyframes: what one holds, and how the network makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.errors import InputError, StateError, UnsupportedError
from vlmattn.tracking.frames import to_mask, to_tensor
from vlmattn.tracking.gauge import Similarity, align
from vlmattn.tracking.models import Adapter, Views
from vlmattn.tracking.passes import Cache, Read, Store, running


@dataclass(frozen=True)
class ModelState:
    """What a map depends on: the model as it was when it was made."""

    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    weights: int

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> ModelState:
        """``modules``: those with own parameters, found once: walking a network takes longer than a frame may."""
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        first = parameters[0]
        kind = first.device.type
        versions = hash(tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters))
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return cls(first.dtype, first.device, autocast, versions)

    def check(self, now: ModelState) -> None:
        """
        Raises:
            StateError: the model is another now.
        """
        changed = [field.name for field in fields(self) if getattr(self, field.name) != getattr(now, field.name)]
        if not changed:
            return
        what = changed[0]
        change = f"its {what} was {getattr(self, what)} and is {getattr(now, what)}"
        change = "its weights are others" if what == "weights" else change
        raise StateError(f"the model changed after the map was made: {change}; call tracker.remap(), or change it back")


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
    state: ModelState

    @property
    def cache_bytes(self) -> int:
        """Size of the keys and values: 2 x attentions x tokens x width x bytes."""
        return sum(x.numel() * x.element_size() for pair in self.cache for x in pair)


class Mapper:
    """Runs the network: checks frames, makes maps.

    Args:
        sim3: align each map to the one before; False: only its first camera.
        cache_dtype: of stored keys and values; None: as they come.
        drop_masked_tokens: in object mode, keep no keys and values of patches off the object.

    Raises:
        UnsupportedError: the model has no parameters.
    """

    def __init__(
        self, adapter: Adapter, model: nn.Module, sim3: bool, cache_dtype: torch.dtype | None, drop_masked_tokens: bool
    ) -> None:
        self.adapter, self.model = adapter, model
        self.sim3, self.cache_dtype, self.drop_masked_tokens = sim3, cache_dtype, drop_masked_tokens
        self._modules = [m for m in model.modules() if any(p is not None for p in m._parameters.values())]
        if not self._modules:
            raise UnsupportedError(f"{type(model).__name__} has no parameters, so there is no network to run")

    def state(self) -> ModelState:
        return ModelState.of(self._modules)

    def frame(self, image: Any, mask: Any, state: ModelState) -> tuple[Tensor, Tensor | None]:
        """A checked frame (or batch) in the model's dtype and on its device, black off the object, and the mask."""
        frame = to_tensor(image)
        multiple = self.adapter.multiple
        height, width = frame.shape[-2:]
        if frame.dim() > 4 or frame.numel() == 0 or height % multiple or width % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise InputError(
                f"a frame is [3, height, width] with sides of whole patches of {multiple}; got {list(frame.shape)},"
                f" near is {near[0]}x{near[1]} (vlmattn.tracking.fit resizes pictures)"
            )
        if self.model.training:
            raise StateError("the model is in training mode, where dropout changes the answers; call model.eval()")
        frame = frame.to(state.device, state.dtype)
        if mask is None:
            return frame, None
        where = to_mask(mask, (*frame.shape[:-3], height, width)).to(state.device)
        return frame * where.unsqueeze(-3), where

    def run(self, this: Store | Read, images: Tensor) -> Views:
        with torch.no_grad(), running(this, self.adapter.attentions()):
            return self.adapter.forward(images, reading=isinstance(this, Read))

    def make(self, images: Tensor, masks: Tensor | None, old: Map | None) -> Map:
        """Run the network on all keyframes; the world of the result is that of the ``old`` map, if there is one.

        A single keyframe is seen twice (KV-Tracker's beginning).

        Raises:
            StateError: the network returned NaN.
        """
        count = len(images)
        store = Store(self.cache_dtype, self._kept_tokens(images, masks))
        views = self.run(store, (images if count > 1 else images.repeat(2, 1, 1, 1))[None])
        poses = views.poses[0, :count].double()
        if not bool(poses.isfinite().all()):
            raise StateError("the network returned NaN for the keyframes; the map is as it was")
        local = None if views.local_points is None else views.local_points[0, :count]
        confidence = None if views.confidence is None else views.confidence[0, :count]
        depth = poses.new_ones(()) if local is None else mean(local[..., 2], masks).mean().double()
        gauge = self._gauge(poses, depth, old, local is not None)
        world = gauge.poses(poses)
        points = None if local is None else in_world(local, world, gauge.scale)
        made = Map(
            cache=store.cache,
            images=images,
            masks=masks,
            poses=world,
            anchors=world,
            points=points,
            confidence=confidence,
            gauge=gauge,
            depth=depth * gauge.scale,
            centre=None if masks is None or points is None else points[masks].mean(0).double(),
            usual=None if confidence is None else mean(confidence, masks).mean(),
            version=1,
            state=self.state(),
        )
        if old is None:
            return made
        anchors = torch.cat([old.anchors[:count].to(world), world[len(old.anchors) :]])
        centre, usual = (None if x is None else x.to(world.device) for x in (old.centre, old.usual))
        return replace(made, anchors=anchors, centre=centre, usual=usual, version=old.version + 1)

    def _gauge(self, poses: Tensor, depth: Tensor, old: Map | None, has_depth: bool) -> Similarity:
        """From the world of this pass to the tracker's."""
        if old is None or not self.sim3:
            return Similarity.to_camera(poses[0])
        anchors = old.anchors[: len(poses)].to(poses)
        return align(poses[: len(anchors)], anchors, old.depth.to(depth) / depth if has_depth else None, depth)

    def _kept_tokens(self, images: Tensor, masks: Tensor | None) -> Tensor | None:
        """bool ``[tokens of all keyframes]``: those whose keys and values are kept; None = all."""
        if masks is None or not self.drop_masked_tokens:
            return None
        patch = self.adapter.multiple
        on = torch.nn.functional.max_pool2d(masks[:, None].float(), patch)[:, 0].flatten(1) > 0
        lead = on.new_ones(len(on), self.adapter.lead)
        kept = torch.cat([lead, on], 1)
        return (kept if len(images) > 1 else kept.repeat(2, 1)).flatten()


def joined(images: Tensor, masks: Tensor | None, frame: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Images and masks of keyframes ``[n, ...]`` and of one more.

    Raises:
        InputError: another size, or a mask where the others have none, or none where they have.
    """
    if frame.shape[-2:] != images.shape[-2:]:
        sizes = [f"{height}x{width}" for height, width in (frame.shape[-2:], images.shape[-2:])]
        raise InputError(f"keyframes are of one size: this is {sizes[0]}, the others are {sizes[1]}; resize it first")
    if (mask is None) != (masks is None):
        raise InputError(
            "either all keyframes have a mask or none; "
            + ("this one has none" if mask is None else "the others have none")
        )
    together = torch.cat([images.to(frame), frame[None]])
    return together, None if mask is None or masks is None else torch.cat([masks.to(mask), mask[None]])


def in_world(local: Tensor, poses: Tensor, scale: Tensor) -> Tensor:
    """Points of the cameras ``[n, height, width, 3]``, in the unit of their pass, in the world."""
    turn, centre = poses[:, None, :3, :3].to(local.dtype), poses[:, None, None, :3, 3].to(local.dtype)
    return scale.to(local.dtype) * local @ turn.transpose(-1, -2) + centre


def mean(values: Tensor, masks: Tensor | None) -> Tensor:
    """Mean over the pixels (of the object) of each frame, ``[frames]``."""
    values = values.float()
    if masks is None:
        return values.flatten(1).mean(1)
    return (values * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp_min(1)
