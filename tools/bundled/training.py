"""How bundled models are trained: stages of steps, a batch for each number, resumed from checkpoints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vlmattn.embedded.scenes import Scene, make_scene, patch_labels
from vlmattn.files import write_whole

Batch = dict[str, Tensor]
_BROKEN_SHARE = 0.15


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        number: names the checkpoint, ``stage<number>.pt``.
        steps: how many.
        every: steps between two checkpoints and lines of the log.
        batch: the batch of a step, from its number alone, so that a resumed run sees what it would have seen.
        loss: what is made small, and figures for the log.
        rate: learning rate of a step; a group of the optimizer takes its ``share`` of it.
    """

    number: int
    steps: int
    every: int
    batch: Callable[[int], Batch]
    loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
    rate: Callable[[int], float]


def scene_batch(stream: int, step: int, count: int) -> tuple[list[Scene], Batch]:
    """Training scenes of a step, at most 64, with pixels and the labels of their patches; 15 % break the prior."""
    drawn = [make_scene(stream, step * 64 + i, None, _BROKEN_SHARE) for i in range(count)]
    pixels = torch.from_numpy(np.stack([image for _, image in drawn])).permute(0, 3, 1, 2).float()
    labels = [patch_labels(scene) for scene, _ in drawn]
    return [scene for scene, _ in drawn], {
        "pixels": (pixels / 255 - 0.5) / 0.25,
        "category": torch.from_numpy(np.stack([a for a, _ in labels])),
        "colour": torch.from_numpy(np.stack([b for _, b in labels])),
    }


class _Batches(Dataset[Batch]):
    def __init__(self, batch: Callable[[int], Batch], start: int, stop: int) -> None:
        self.batch, self.start, self.stop = batch, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Batch:
        return self.batch(self.start + index)


def run_stage(trainee: nn.Module, optimizer: torch.optim.Optimizer, stage: Stage, folder: Path, workers: int) -> None:
    """Train one stage to its end, from its checkpoint if there is one; figures go to ``log.jsonl``.

    Checkpoints hold the parameters that may be trained.
    """
    path, (start, seconds) = checkpoint(folder, stage.number), (0, 0.0)
    if path.exists():
        state = torch.load(path, weights_only=True)
        load_trained(trainee, state["trainee"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    loader = DataLoader(_Batches(stage.batch, start, stage.steps), batch_size=None, num_workers=workers)
    batches: Iterator[Batch] = iter(loader)
    sums: dict[str, list[float]] = {}
    begun = time.monotonic() - seconds
    for step in range(start, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step) * group["share"]
        loss, figures = stage.loss(next(batches))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        for name, value in ({"loss": loss} | figures).items():
            if not value.isnan():  # a batch without such turns
                sums.setdefault(name, []).append(float(value.detach()))
        if (step + 1) % stage.every == 0 or step + 1 == stage.steps:
            seconds = time.monotonic() - begun
            line: dict[str, float] = {"stage": stage.number, "step": step + 1, "seconds": round(seconds)}
            line |= {name: round(float(np.mean(values)), 4) for name, values in sorted(sums.items())}
            sums = {}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            state = {"trainee": trained(trainee), "optimizer": optimizer.state_dict()}
            _save(path, state | {"step": step + 1, "seconds": seconds})


def checkpoint(folder: Path, number: int) -> Path:
    return folder / f"stage{number}.pt"


def trained(trainee: nn.Module) -> dict[str, Tensor]:
    """The parameters that may be trained."""
    return {name: parameter.detach() for name, parameter in trainee.named_parameters() if parameter.requires_grad}


def load_stage(trainee: nn.Module, folder: Path, number: int) -> None:
    """Take the parameters of a stage's checkpoint."""
    load_trained(trainee, torch.load(checkpoint(folder, number), weights_only=True)["trainee"])


def load_trained(trainee: nn.Module, state: dict[str, Tensor]) -> None:
    """Take back what ``trained`` gave.

    Raises:
        ValueError: names that this model does not train, or that are missing.
    """
    if set(state) != set(trained(trainee)):
        raise ValueError("the checkpoint is of another model")
    trainee.load_state_dict(state, strict=False)


def last_stage(folder: Path, stages: int) -> int:
    """The stage to go on with: the last that has a checkpoint, or the first."""
    return max((n for n in range(1, stages + 1) if checkpoint(folder, n).exists()), default=1)


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def write_log(log: list[dict[str, Any]], target: Path) -> None:
    """The figures of a training as a JSON list, one line each."""
    write_whole(target, "[\n" + ",\n".join(json.dumps(line) for line in log) + "\n]\n")


def _save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
