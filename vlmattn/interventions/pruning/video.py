"""The shape of methods that drop tokens of videos before the first layer, by how their frames differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.interventions.pruning.early import EarlyPruning, images_of
from vlmattn.options import option
from vlmattn.request import VIDEO, KeptTokens, PruningStage


@dataclass(frozen=True, kw_only=True)
class VideoPruning(EarlyPruning):
    """Base of methods that choose among the tokens of videos, all frames at once: only ``pick_frames`` is theirs.

    A video is a row of frames with equally many tokens; where the size changes, another video begins. One token more
    behind the last frame (LLaVA-OneVision's newline) stays. Images stay whole.
    """

    keep_ratio: float = option(0.25, 0, 1, "share of the tokens of each video that stays")

    def pick_frames(self, video: Tensor) -> Tensor:
        """The tokens of a video ``[frames, n, hidden]`` that stay, bool ``[frames, n]``."""
        raise NotImplementedError

    def on_embeddings(self, stage: PruningStage) -> None:
        stays = stage.visual.clone()
        kinds = stage.request.types(stage.start + stage.hidden.shape[1], stage.hidden.device)[:, stage.start :]
        frames: list[list[Tensor]] = [[] for _ in stage.given]
        for row, slots in images_of(stage):
            frames[row] += [slots] if bool(kinds[row, slots[0]] == VIDEO) else []
        for row, found in enumerate(frames):
            for first, count in videos(list(map(len, found))):
                size = len(found[first])
                slots = torch.stack([frame[:size] for frame in found[first : first + count]])
                stays[row, slots] = self.pick_frames(stage.hidden[row, slots])
        stage.request.store(self).by_slot("stays", False, torch.bool).write(stage.start, stays)

    def choose_tokens(self, stage: PruningStage) -> KeptTokens:
        kept = self.staying(stage)
        return KeptTokens(kept, tuple(kept.sum(1).tolist()))


def videos(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rows of frames of one size: the first frame and how many; the last may have one token more."""
    first = 0
    for number in range(1, len(sizes) + 1):
        ended = number == len(sizes) or sizes[number - 1] > sizes[first]
        if ended or sizes[number] not in (sizes[first], sizes[first] + 1):
            yield first, number - first
            first = number
