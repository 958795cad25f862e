"""How the bundled tracker was trained: two CPU cores, every batch follows from seed and step.

    python -m tools.bundled.train_rooms --out runs/tracker            # train (resumes from its last checkpoint)
    python -m tools.bundled.train_rooms --out runs/tracker --export vlmattn/tracking/tiny-rooms

A batch holds rooms seen by a few map views and some query views. Map views see each other; a query sees the map and
itself and is seen by nobody, which is what tracking against a cache computes. The network learns to speak of the frame
of the mean camera of the map. Views start near each other and spread out. Two heads of each global block are told where
the patches of other views show the same place, which they would find by themselves much later.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

from vlmattn.files import write_whole
from vlmattn.tracking.bundled import save
from vlmattn.tracking.network import MultiViewNetwork, NetworkConfig
from vlmattn.tracking.rooms import make_rooms, random_poses, render

SEED = 2027
STEPS = 8_000
RATE = 1e-3
_NEAR_PLANS = ((16, 2, 1), (8, 4, 2), (16, 2, 1), (4, 8, 4))  # rooms, map views, queries: at first
_PLANS = ((12, 2, 2), (6, 4, 4), (4, 8, 4), (3, 12, 4))  # and then
_NEAR_UNTIL, _SPREAD_BY = 1_500, 2_000  # steps: of the first plans; until views lie as far apart as they will
_GUIDED = 2  # heads of the global blocks that are told where to look
_NEAR = 0.2  # how near patches of two views must lie to show the same place
_CLOSE = 0.3  # depths below count as this deep in relative errors
_MATCH, _EARLY, _POSE, _PRECISION = 0.2, 0.2, 0.3, 0.1  # weights of parts of the loss
_SAVED_EVERY = 250
_AVERAGE = 0.998  # how much of the averaged weights stays each step


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that follow from these numbers alone."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(seed)


def batch(step: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pictures, points in the camera, poses, and how many of the views are the map."""
    plans = _NEAR_PLANS if step < _NEAR_UNTIL else _PLANS
    rooms_count, views, queries = plans[step % len(plans)]
    draw = generator(SEED, step)
    rooms = make_rooms(rooms_count, draw)
    spread = min(1.0, 0.4 + 0.6 * step / _SPREAD_BY)
    poses = random_poses(rooms, views + queries, draw, spread)
    images, local = render(rooms, poses)
    return images, local, poses, views


def visibility(views: int, total: int) -> Tensor:
    """Map views see the map; a query sees the map and itself."""
    sees = torch.eye(total, dtype=torch.bool)
    sees[:, :views] = True
    return sees


def losses(network: MultiViewNetwork, images: Tensor, local: Tensor, poses: Tensor, views: int) -> dict[str, Tensor]:
    """Parts of the loss, by name."""
    patch = network.config.patch_size
    mean = (
        local.unfold(2, patch, patch).unfold(3, patch, patch).mean((-1, -2)).flatten(2, 3)
    )  # [rooms, views, patches, 3]
    poses = in_mean_camera(poses, views)
    world = mean @ poses[..., :3, :3].transpose(-1, -2) + poses[..., None, :3, 3]
    seen = visibility(views, images.shape[1])
    with Watch() as watch, torch.autocast("cpu", torch.bfloat16):
        layers = network.tokens(images, seen)
    out = {"match": _MATCH * matching(network, watch.calls[1::2], world, seen)}
    for number, tokens in enumerate(layers[1:-1]):
        said = network.anchors(tokens, images)[2]
        out[f"world{number + 1}"] = _EARLY * (said - world).norm(dim=-1).mean()
    points, anchor, said, precision = network.anchors(layers[-1], images)
    error = (said - world).norm(dim=-1)
    out["world"] = error.mean()
    out["precision"] = _PRECISION * (error.detach() * precision.exp() - precision).mean()
    out["anchor"] = (anchor - mean).norm(dim=-1).mean()
    out["local"] = ((points - local).norm(dim=-1) / local[..., 2].clamp_min(_CLOSE)).mean()
    out["pose"] = _POSE * _off(said, anchor, precision, poses).mean()
    return out


def in_mean_camera(poses: Tensor, views: int) -> Tensor:
    """Poses in the frame of the map views' mean camera: mean rotation (chordal) and mean of the centres.

    The world that the network learns to speak of. It could choose its own, but then it drifts, and training with it.
    """
    u, _, vt = torch.linalg.svd(poses[:, :views, :3, :3].mean(1))
    frame = torch.eye(4).repeat(len(poses), 1, 1)
    frame[:, :3, :3] = u @ vt  # views lie within a half turn: no reflection
    frame[:, :3, 3] = poses[:, :views, :3, 3].mean(1)
    moved: Tensor = torch.linalg.inv(frame)[:, None] @ poses
    return moved


def _off(world: Tensor, local: Tensor, precision: Tensor, poses: Tensor) -> Tensor:
    """Error ``[rooms, views]`` of the motion from ``local`` to ``world``: distance + sine of the turn.

    Told by sums and torques at the true pose. The motion itself has no gradient to learn from: where two of its
    singular values meet it is without bounds.
    """
    weight = precision.exp()
    weight = (weight / weight.sum(-1, keepdim=True))[..., None]
    there = local @ poses[..., :3, :3].transpose(-1, -2) + poses[..., None, :3, 3]
    mean, mean_there = (weight * world).sum(-2, keepdim=True), (weight * there).sum(-2, keepdim=True)
    arm = there - mean_there
    torque = (weight * torch.linalg.cross(arm, world - mean)).sum(-2).norm(dim=-1)
    off: Tensor = (mean - mean_there)[..., 0, :].norm(dim=-1) + torque / (weight * arm.square()).sum((-1, -2))
    return off


class Watch(TorchFunctionMode):
    """Notes queries and keys of every attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(args[:2])
        return func(*args, **(kwargs or {}))


def matching(network: MultiViewNetwork, calls: list[tuple[Tensor, Tensor]], world: Tensor, seen: Tensor) -> Tensor:
    """Cross-entropy of the guided heads' attention and the patches of other views that show the same place."""
    _, total, patches, _ = world.shape
    place = world.flatten(1, 2)
    view = torch.arange(total).repeat_interleave(patches)
    other = (view[:, None] != view) & seen[view][:, view]
    distance = torch.cdist(place, place)
    target = (-0.5 * (distance / _NEAR) ** 2).masked_fill(~other, -torch.inf)
    known = distance.masked_fill(~other, torch.inf).amin(-1) < 1.5 * _NEAR  # patches that another view shows too
    target = target.softmax(-1)
    out = []
    for q, k in calls[1:]:
        q, k = (_patches(x[:, :_GUIDED], total, network.config.registers) for x in (q, k))
        score = (q.float() @ k.float().transpose(-1, -2)) / math.sqrt(q.shape[-1])
        said = score.masked_fill(~other, -1e4).log_softmax(-1)
        entropy = -(target[:, None] * said).sum(-1)
        floor = -(target * target.clamp_min(1e-9).log()).sum(-1)
        out.append(((entropy - floor[:, None]) * known[:, None]).sum() / (known.sum() * _GUIDED).clamp_min(1))
    return torch.stack(out).mean()


def _patches(x: Tensor, views: int, registers: int) -> Tensor:
    """``[rooms, heads, tokens, dim]`` without the register tokens."""
    return x.reshape(*x.shape[:2], views, -1, x.shape[-1])[:, :, :, registers:].flatten(2, 3)


def relative(poses: Tensor, views: int) -> Tensor:
    """Poses of all views in each map view: ``[rooms, views, total, 4, 4]``."""
    told: Tensor = torch.linalg.inv(poses[:, :views, None]) @ poses[:, None]
    return told


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between rotations."""
    trace = (a[..., :3, :3] * b[..., :3, :3]).sum((-1, -2))
    return torch.rad2deg(torch.acos(((trace - 1) / 2).clamp(-1, 1)))


@torch.no_grad()
def validate(network: MultiViewNetwork, rooms_count: int = 24, views: int = 8, queries: int = 4) -> dict[str, float]:
    """Held-out rooms: median errors of queries against each map view, with another room's map, and of identity."""
    draw = generator(SEED, 10**9)
    rooms = make_rooms(rooms_count, draw)
    poses = random_poses(rooms, views + queries, draw)
    images, local = render(rooms, poses)
    sees = visibility(views, views + queries)
    out = network(images, sees)
    wrong = images.clone()
    wrong[:, :views] = images.roll(1, 0)[:, :views]
    swapped = network(wrong, sees)["camera_poses"]
    truth = relative(poses, views)
    told = relative(out["camera_poses"], views)
    other = torch.linalg.inv(out["camera_poses"][:, :views, None]) @ swapped[:, None]
    pairs = ~torch.eye(views, dtype=torch.bool)
    turn, way = angle(told, truth), (told - truth)[..., :3, 3].norm(dim=-1)
    still = torch.eye(4).expand_as(truth)
    return dict(
        map_turn=turn[:, :, :views][:, pairs].median().item(),
        map_way=way[:, :, :views][:, pairs].median().item(),
        turn=turn[:, :, views:].median().item(),
        way=way[:, :, views:].median().item(),
        turn_wrong=angle(other, truth)[:, :, views:].median().item(),
        turn_still=angle(still, truth)[:, :, views:].median().item(),
        way_still=truth[:, :, views:, :3, 3].norm(dim=-1).median().item(),
        points=((out["local_points"] - local).norm(dim=-1) / local[..., 2]).mean().item(),
    )


def train(out: Path, steps: int, threads: int, config: NetworkConfig | None = None) -> MultiViewNetwork:
    """Train, or go on from the last checkpoint in ``out``."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    network = MultiViewNetwork(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.02, betas=(0.9, 0.98))
    step, log, spent = 0, [], 0
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step, log = state["step"], json.loads(state["log"])
        spent = log[-1]["seconds"]
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGE))  # type: ignore[no-untyped-call]
    if checkpoint.exists():
        averaged.load_state_dict(state["averaged"])
    begun = time.monotonic()
    while step < steps:
        rate = learning_rate(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        parts = losses(network, *batch(step))
        loss = torch.stack(list(parts.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        averaged.update_parameters(network)
        if step % _SAVED_EVERY == 0 or step == steps:
            entry: dict[str, Any] = dict(
                step=step, seconds=round(spent + time.monotonic() - begun), **validate(_own(averaged))
            )
            entry.update({name: part.item() for name, part in parts.items()})
            log.append(entry)
            print(json.dumps({k: round(v, 3) for k, v in entry.items()}), flush=True)
            state = dict(
                network=network.state_dict(),
                averaged=averaged.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                log=json.dumps(log),
            )
            torch.save(state, out / "checkpoint.tmp")
            os.replace(out / "checkpoint.tmp", checkpoint)
    return _own(averaged)


def _own(averaged: AveragedModel) -> MultiViewNetwork:
    """The network that holds the averaged weights."""
    assert isinstance(averaged.module, MultiViewNetwork)
    return averaged.module


def learning_rate(step: int, steps: int) -> float:
    """A cosine to 0 after a short warm-up."""
    return RATE * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))


def export(network: MultiViewNetwork, out: Path, folder: Path) -> None:
    """Weights, sizes and log of a finished run."""
    save(network, folder)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    write_whole(folder / "training_log.json", json.dumps(_rounded(json.loads(state["log"])), indent=0) + "\n")


def _rounded(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: round(value, 4) for name, value in entry.items()} for entry in log]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the same command resumes it")
    parser.add_argument("--export", type=Path, help="write the network there when all steps are done")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    network = train(options.out, options.steps, options.threads)
    if options.export:
        export(network, options.out, options.export)


if __name__ == "__main__":
    main()
