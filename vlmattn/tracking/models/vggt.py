"""VGGT (arXiv 2503.11651): the first frame has tokens of its own, and the camera head attends across frames.

A tracked frame is never the first. The network would take it for that, being alone in its pass, so its leading tokens
are put right where the first block meets them. The camera head refines poses with a few blocks over the camera tokens
of all frames; their keys and values are stored and read like those of the other global blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.tracking import passes
from vlmattn.tracking.gauge import rotations
from vlmattn.tracking.models.base import Adapter, Views, register_adapter


@register_adapter
class VGGTAdapter(Adapter):
    """``VGGT`` of facebookresearch/vggt: ``aggregator`` with frame and global blocks, ``camera_head`` with a trunk."""

    name = "vggt"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        aggregator = self.model.aggregator
        self.multiple, self.lead = aggregator.patch_size, aggregator.patch_start_idx

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        aggregator = getattr(model, "aggregator", None)
        parts = ("global_blocks", "frame_blocks", "camera_token", "register_token")
        return all(hasattr(aggregator, part) for part in parts) and hasattr(
            getattr(model, "camera_head", None), "trunk"
        )

    def attentions(self) -> Sequence[nn.Module]:
        blocks = [*self.model.aggregator.global_blocks, *self.model.camera_head.trunk]
        return [block.attn for block in blocks]

    def forward(self, images: Tensor, reading: bool) -> Views:
        out = self._run_later_frame(images) if reading else self.model(images)
        encoded = out["pose_enc"]
        poses = _camera_to_world(encoded)
        depth = out.get("depth")
        points = None if depth is None else _unproject(depth[..., 0], encoded[..., 7:9])
        return Views(poses, points, out.get("depth_conf"))

    def _run_later_frame(self, images: Tensor) -> Any:
        aggregator, this = self.model.aggregator, passes.current()
        registers = aggregator.register_token[:, 1]
        later = torch.cat([aggregator.camera_token[:, 1], registers], 1)  # [1, lead, width]

        def put_right(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if passes.current() is not this:  # another thread's frame
                return None
            tokens = args[0].clone()
            tokens[:, : later.shape[1]] = later.to(tokens.dtype)
            return (tokens, *args[1:])

        handle = aggregator.frame_blocks[0].register_forward_pre_hook(put_right)
        try:
            return self.model(images)
        finally:
            handle.remove()


def _camera_to_world(encoded: Tensor) -> Tensor:
    """Poses from ``[..., 9]``: translation and quaternion (xyzw) from world to camera, two fields of view."""
    turn = rotations(torch.nn.functional.normalize(encoded[..., 3:7], dim=-1)).transpose(-1, -2)  # camera to world
    pose = torch.eye(4, dtype=encoded.dtype, device=encoded.device).repeat(*encoded.shape[:-1], 1, 1)
    pose[..., :3, :3] = turn
    pose[..., :3, 3] = -(turn @ encoded[..., :3, None])[..., 0]
    return pose


def _unproject(depth: Tensor, field: Tensor) -> Tensor:
    """Camera points ``[..., height, width, 3]`` of depths and (vertical, horizontal) fields of view in radians."""
    height, width = depth.shape[-2:]
    down = (torch.arange(height, device=depth.device) + 0.5) / height * 2 - 1
    right = (torch.arange(width, device=depth.device) + 0.5) / width * 2 - 1
    slope = torch.tan(field / 2)[..., None, None]
    x = depth * right * slope[..., 1, :, :]
    y = depth * down[:, None] * slope[..., 0, :, :]
    return torch.stack([x, y, depth], -1)
