"""Tiny multi-view networks built like the public ones (names of parts, order of frames and tokens), and the masked oracle."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmattn.tracking.network import MultiViewNetwork, NetworkConfig, rotary_2d, rotate

PATCH, WIDTH, HEADS = 4, 32, 2


class Attention(nn.Module):
    """q, k, v from one projection; normed, rotated; stock SDPA inside a choice of backends, as pi^3 does."""

    def __init__(self, rope: bool = True) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)
        self.rope = rope

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).transpose(1, 3).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if pos is not None:
            rotary = rotary_2d(pos[0], WIDTH // HEADS)
            q, k = rotate(q, rotary), rotate(k, rotary)
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, pos: Tensor | None = None, xpos: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), xpos if pos is None else pos)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, images: Tensor, is_training: bool = True) -> dict[str, Tensor]:
        return {"x_norm_patchtokens": self.patch(images).flatten(2).transpose(1, 2)}


def places(images: Tensor, lead: int) -> Tensor:
    """Patch positions from 1 on, special tokens at 0: ``[1, tokens, 2]``."""
    grid = torch.cartesian_prod(*(torch.arange(side // PATCH) for side in images.shape[-2:])) + 1
    return torch.cat([grid.new_zeros(lead, 2), grid])[None]


class Pi3(nn.Module):
    """Blocks alternate in one list, odd ones global; three frame-wise decoders; camera to world."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.patch_start_idx = PATCH, 5
        self.encoder = Encoder()
        self.decoder = nn.ModuleList(Block() for _ in range(4))
        self.register_token = nn.Parameter(torch.randn(1, 1, 5, WIDTH))
        self.point_decoder, self.conf_decoder, self.camera_decoder = Block(), Block(), Block()
        self.point_head, self.conf_head = nn.Linear(WIDTH, 3 * PATCH**2), nn.Linear(WIDTH, PATCH**2)
        self.camera_head = nn.Linear(WIDTH, 12)

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        batch, frames = imgs.shape[:2]
        x = self.encoder(imgs.flatten(0, 1))["x_norm_patchtokens"]
        x = torch.cat([self.register_token[0].expand(len(x), -1, -1), x], 1)
        length = x.shape[1]
        pos = places(imgs, 5)
        for number, block in enumerate(self.decoder):
            if number % 2 == 0:
                x = block(x.reshape(batch * frames, length, -1), xpos=pos)
            else:
                x = block(x.reshape(batch, frames * length, -1), xpos=pos.repeat(1, frames, 1))
        x = x.reshape(batch * frames, length, -1)
        local = pixels(self.point_head(self.point_decoder(x, xpos=pos)[:, 5:]), imgs)
        depth = local[..., 2:].exp()
        local = torch.cat([local[..., :2] * depth, depth], -1)
        camera = self.camera_head(self.camera_decoder(x, xpos=pos)[:, 5:].mean(1)).view(batch, frames, 12)
        pose = torch.eye(4, dtype=x.dtype).repeat(batch, frames, 1, 1)
        pose[..., :3, :3] = torch.linalg.qr(camera[..., :9].view(batch, frames, 3, 3) + torch.eye(3, dtype=x.dtype))[0]
        pose[..., :3, :3] *= torch.linalg.det(pose[..., :3, :3])[..., None, None]
        pose[..., :3, 3] = camera[..., 9:]
        return dict(
            camera_poses=pose,
            local_points=local,
            conf=pixels(self.conf_head(self.conf_decoder(x, xpos=pos)[:, 5:]), imgs),
        )


def pixels(x: Tensor, images: Tensor) -> Tensor:
    """Patch features to pixels ``[batch, frames, height, width, channels]``."""
    batch, frames, _, height, width = images.shape
    x = x.reshape(batch, frames, height // PATCH, width // PATCH, PATCH, PATCH, -1)
    return x.transpose(3, 4).reshape(batch, frames, height, width, -1)


class Aggregator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.patch_start_idx = PATCH, 3
        self.patch_embed = Encoder()
        self.frame_blocks = nn.ModuleList(Block() for _ in range(2))
        self.global_blocks = nn.ModuleList(Block() for _ in range(2))
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, WIDTH))
        self.register_token = nn.Parameter(torch.randn(1, 2, 2, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        batch, frames = images.shape[:2]
        x = self.patch_embed(images.flatten(0, 1))["x_norm_patchtokens"]
        first_or_later = [0] + [1] * (frames - 1)
        lead = torch.cat([self.camera_token, self.register_token], 2)[0, first_or_later].repeat(batch, 1, 1)
        x = torch.cat([lead, x], 1)
        length = x.shape[1]
        pos = places(images, 3)
        for within, across in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = within(x, pos=pos)
            x = across(x.view(batch, frames * length, -1), pos=pos.repeat(1, frames, 1)).view(
                batch * frames, length, -1
            )
        return x.view(batch, frames, length, -1)


class CameraHead(nn.Module):
    """Refines poses in a few rounds; its trunk attends over the camera tokens of all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(Block(), Block())
        self.embed, self.pose_branch = nn.Linear(9, WIDTH), nn.Linear(WIDTH, 9)

    def forward(self, tokens: Tensor, rounds: int = 3) -> Tensor:
        camera = tokens[:, :, 0]
        pose = camera.new_zeros(*camera.shape[:2], 9)
        for _ in range(rounds):
            pose = pose + self.pose_branch(self.trunk(camera + self.embed(pose)))
        return pose


class VGGT(nn.Module):
    """Frame and global blocks in two lists; tokens of the first frame differ; world to camera."""

    def __init__(self) -> None:
        super().__init__()
        self.aggregator, self.camera_head = Aggregator(), CameraHead()
        self.depth_head = nn.Linear(WIDTH, 2 * PATCH**2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.aggregator(images)
        depth, sure = pixels(self.depth_head(x[:, :, 3:]), images).split(1, -1)
        return dict(pose_enc=self.camera_head(x), depth=depth.exp(), depth_conf=1 + sure[..., 0].exp())


def rooms_network() -> MultiViewNetwork:
    return MultiViewNetwork(NetworkConfig(patch_size=PATCH, width=WIDTH, heads=HEADS, pairs=2))


NETWORKS = {"rooms": rooms_network, "pi3": Pi3, "vggt": VGGT}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A seeded network, large enough weights that frames matter to each other."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return NETWORKS[name]().eval().to(dtype)


def images(count: int, height: int = 12, width: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count + height), dtype=dtype)


class _Mask(TorchFunctionMode):
    def __init__(self, frames: int) -> None:
        super().__init__()
        self._frames = frames

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        frame = torch.arange(self._frames).repeat_interleave(args[0].shape[2] // self._frames)
        newest = self._frames - 1
        sees = (frame[:, None] == newest) | (frame != newest)
        return func(*args, **{**(kwargs or {}), "attn_mask": sees})


def _masked(module: nn.Module, frames: int, *args: Any, **kwargs: Any) -> Any:
    with _Mask(frames):
        return type(module).forward(module, *args, **kwargs)


@contextlib.contextmanager
def last_frame_hidden(modules: Any, frames: int) -> Any:
    """In these modules no frame but itself sees the last one."""
    for module in modules:
        module.forward = functools.partial(_masked, module, frames)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
