"""A small multi-view network after pi^3 (arXiv 2507.13347): no view is the reference, each pass has its frame.

Blocks alternate between attention within a frame and attention over all frames; a few register tokens ride along with
the patches of each frame; positions are two-dimensional rotary embeddings on the patch grid, the same in all frames, so
the order of frames does not matter. Different from pi^3: every patch says where it lies in the camera and where in the
world, with a confidence, and the camera is the rigid motion between the two (weighted Procrustes) rather than a
regression.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmattn.tracking.gauge import nearest_rotation


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a ``MultiViewNetwork``."""

    image_size: int = 48
    patch_size: int = 8
    width: int = 128
    heads: int = 4
    pairs: int = 4  # frame block + global block
    ratio: int = 3  # MLP
    registers: int = 2


def rotary_2d(positions: Tensor, dim: int, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[tokens, dim]``: half of the head turns with the row, half with the column."""
    quarter = dim // 4
    speed = base ** -(torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter)
    angle = positions.float()[:, :, None] * speed  # [tokens, 2, quarter]
    angle = angle.repeat(1, 1, 2).flatten(1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply ``rotary_2d`` to ``[batch, heads, tokens, dim]``."""
    cos, sin = rotary
    halves = x.view(*x.shape[:-1], 2, 2, -1)
    turned = torch.stack([-halves[..., 1, :], halves[..., 0, :]], -2).flatten(-3)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        dim = config.width // config.heads
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.q_norm, self.k_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), rotary).to(v.dtype), rotate(self.k_norm(k), rotary).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.attn = nn.LayerNorm(width), Attention(config)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.ratio * width), nn.GELU(), nn.Linear(config.ratio * width, width)
        )
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 0.2)) for _ in range(2))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        x = x + self.scale1 * self.attn(self.norm1(x), rotary, mask)
        out: Tensor = x + self.scale2 * self.mlp(self.norm2(x))
        return out


class MultiViewNetwork(nn.Module):
    """Pictures of one scene in, cameras and points out.

    ``forward(images, sees=None)``: ``images`` ``[batch, frames, 3, height, width]`` in [0, 1], sides of whole patches;
    ``sees`` bool ``[frames, frames]`` says which frames (rows) see which in the global blocks. Returns a dict:

    - ``camera_poses`` ``[batch, frames, 4, 4]``: camera to world, OpenCV axes, in this pass's own world;
    - ``local_points`` and ``points`` ``[batch, frames, height, width, 3]``: in the camera and in the world;
    - ``conf`` ``[batch, frames, height, width, 1]``: logit of being right.
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NetworkConfig()
        width, patch = config.width, config.patch_size
        self.stem = nn.Sequential(
            nn.Conv2d(5, width // 2, patch // 2, patch // 2), nn.GELU(), nn.Conv2d(width // 2, width, 2, 2)
        )
        self.register_tokens = nn.Parameter(torch.randn(1, config.registers, width) * 0.02)
        self.frame_blocks = nn.ModuleList(Block(config) for _ in range(config.pairs))
        self.global_blocks = nn.ModuleList(Block(config) for _ in range(config.pairs))
        self.norm = nn.LayerNorm(width)
        self.local_head = nn.Linear(width, 3 * patch * patch)
        self.world_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))

    def forward(self, images: Tensor, sees: Tensor | None = None) -> dict[str, Tensor]:
        return self.read(self.tokens(images, sees)[-1], images)

    def tokens(self, images: Tensor, sees: Tensor | None = None) -> list[Tensor]:
        """Patch tokens ``[batch, frames, patches, width]`` after each pair of blocks."""
        batch, frames = images.shape[:2]
        registers = self.config.registers
        x = self._embed(images.flatten(0, 1))
        grid = tuple(side // self.config.patch_size for side in images.shape[-2:])
        x = torch.cat([self.register_tokens.expand(len(x), -1, -1).to(x.dtype), x], 1)
        length, dim = x.shape[1], self.config.width // self.config.heads
        places = torch.cartesian_prod(*(torch.arange(side, device=x.device) for side in grid)) + 1
        places = torch.cat([places.new_zeros(registers, 2), places])
        rotary = rotary_2d(places, dim)
        everywhere = tuple(table.repeat(frames, 1) for table in rotary)
        mask = None
        if sees is not None:
            mask = sees.repeat_interleave(length, 0).repeat_interleave(length, 1)
        out = []
        for within, across in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = within(x, rotary)
            x = across(x.view(batch, frames * length, -1), everywhere, mask).view(batch * frames, length, -1)
            out.append(x[:, registers:].reshape(batch, frames, length - registers, -1))
        return out

    def _embed(self, images: Tensor) -> Tensor:
        down, right = (torch.linspace(-1, 1, side, device=images.device) for side in images.shape[-2:])
        place = torch.stack(torch.meshgrid(right, down, indexing="xy")).to(images.dtype)
        pixels = torch.cat([(images - 0.5) * 4, place.expand(len(images), -1, -1, -1)], 1)
        patches: Tensor = self.stem(pixels).flatten(2).transpose(1, 2)
        return patches

    def anchors(self, tokens: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Local points ``[..., height, width, 3]``, their mean by patch, world points and log precision of patches."""
        patch = self.config.patch_size
        rows, columns = (side // patch for side in images.shape[-2:])
        x = self.norm(tokens)
        raw = _wide(self.local_head(x)).view(*x.shape[:-1], patch * patch, 3)
        depth = torch.exp(raw[..., 2:].clamp(-4, 4))
        local = torch.cat([raw[..., :2] * depth, depth], -1)  # [batch, frames, patches, pixels, 3]
        anchor = local.mean(-2)
        said = _wide(self.world_head(x))
        local = local.view(*x.shape[:2], rows, columns, patch, patch, 3).transpose(3, 4)
        local = local.reshape(*x.shape[:2], rows * patch, columns * patch, 3)
        return local, anchor, anchor.detach() + said[..., :3], said[..., 3].clamp(-4, 5)

    def read(self, tokens: Tensor, images: Tensor) -> dict[str, Tensor]:
        """The heads: cameras, points and confidences of the last tokens."""
        local, anchor, world, precision = self.anchors(tokens, images)
        pose = rigid(anchor, world, precision.exp())
        points = local @ pose[..., None, :3, :3].transpose(-1, -2) + pose[..., None, None, :3, 3]
        rows, columns = (side // self.config.patch_size for side in images.shape[-2:])
        conf = precision.view(*precision.shape[:-1], rows, columns)
        conf = conf.repeat_interleave(self.config.patch_size, -2).repeat_interleave(self.config.patch_size, -1)
        return dict(camera_poses=pose, local_points=local, points=points, conf=conf[..., None])


def _wide(x: Tensor) -> Tensor:
    """At least float32, which depths and motions need."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rigid(source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The rigid motion ``[..., 4, 4]`` from ``source`` to ``target`` ``[..., points, 3]`` (weighted Procrustes)."""
    weight = (weight / weight.sum(-1, keepdim=True))[..., None]
    from_, to = (weight * source).sum(-2, keepdim=True), (weight * target).sum(-2, keepdim=True)
    turn = nearest_rotation((weight * (target - to)).transpose(-1, -2) @ (source - from_))
    pose = torch.zeros(*turn.shape[:-2], 4, 4, dtype=turn.dtype, device=turn.device)
    pose[..., :3, :3] = turn
    pose[..., :3, 3] = (to - from_ @ turn.transpose(-1, -2))[..., 0, :]
    pose[..., 3, 3] = 1
    return pose
