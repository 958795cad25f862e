"""Which image or frame each token belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TEXT, IMAGE, VIDEO = 0, 1, 2  # types of tokens


def number_images(types: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Number of the image of each visual token within its row, -1 for text.

    Args:
        types: ``[batch, tokens]``.
        lengths: tokens of each image, in (row, token) order, when the model said so; else every unbroken run of visual
            tokens counts as one image.
    """
    visual = types != TEXT
    previous = torch.nn.functional.pad(types, (1, 0))[:, :-1]
    starts = visual & (types != previous)
    if lengths and sum(lengths) == int(visual.sum()):
        flat = torch.zeros(int(visual.sum()), dtype=torch.bool)
        flat[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
        starts = torch.zeros_like(visual).masked_scatter(visual, flat.to(visual.device))
    return torch.where(visual, starts.cumsum(1) - 1, -1).to(torch.int16)


def video_runs(types: Tensor) -> list[int]:
    """Lengths of the unbroken runs of video tokens, in (row, token) order."""
    video = types == VIDEO
    starts = video & ~torch.nn.functional.pad(video, (1, 0))[:, :-1]
    if not bool(video.any()):
        return []
    return torch.bincount((starts.flatten().cumsum(0) - 1)[video.flatten()]).tolist()  # type: ignore[no-any-return]


def number_frames(types: Tensor, numbers: Tensor, lengths: Sequence[int]) -> Tensor:
    """Numbers of images in which every frame of a video has a number of its own.

    Args:
        types, numbers: ``[batch, tokens]``; lengths: tokens of each frame, in (row, token) order.
    """
    video = types == VIDEO
    before = torch.nn.functional.pad(numbers.cummax(1).values, (1, 0), value=-1)[:, :-1]
    flat = torch.zeros(sum(lengths), dtype=torch.bool)
    flat[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    starts = (numbers > before) | torch.zeros_like(video).masked_scatter(video, flat.to(video.device))
    return torch.where(numbers >= 0, starts.cumsum(1) - 1, -1).to(torch.int16)
