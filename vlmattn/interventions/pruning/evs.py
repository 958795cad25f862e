"""EVS: drop the tokens of a video that are as in the frame before (arXiv 2510.14624)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmattn.interventions.pruning import choices
from vlmattn.interventions.pruning.video import VideoPruning, videos
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "evs",
    paper="arXiv:2510.14624",
    code="github.com/vllm-project/vllm (multimodal/evs.py), transformers (nemotron_h_omni)",
    faithful="golden (the choice)",
    parts="keep",
    cost="prefill: one cosine a token; all layers run on the rest, from the first on. Decode: fewer keys",
    presets={"evs": ("a quarter of the tokens of each video", {})},
)
@dataclass(frozen=True, kw_only=True)
class EVS(VideoPruning):
    """Before the first layer keep the first frame of each video, and of the later ones the tokens that changed most.

    With x[t, j] token j of frame t of T, n tokens a frame, as the language model gets them:

        d[t, j] = 1 - cos(x[t, j], x[t - 1, j]),   d[0, j] = infinity

    the max(n, int(keep_ratio T n)) tokens with the largest d stay, ties in their order. Frames as the tower merges
    them. Kept tokens have their order and position ids. Images stay whole; ``cost`` counts them as frames. Counts
    dropped tokens.
    """

    keep_ratio: float = option(0.25, 0, 1, "share of the tokens of each video that stays; q of vLLM is 1 - this")

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        return sum(
            sum(given[first : first + count]) - count * given[first] + self._of_video(count, given[first])
            for first, count in videos(given)
        )

    def _of_video(self, frames: int, tokens: int) -> int:
        return max(tokens, int(self.keep_ratio * frames * tokens))

    def comparing(self, layer: int, given: Sequence[int], width: int) -> int:
        return 2 * width * sum(given)

    def pick_frames(self, video: Tensor) -> Tensor:
        frames, tokens, _ = video.shape
        changed = 1 - cosine_similarity(video[1:].float(), video[:-1].float(), dim=-1)
        first = torch.full_like(changed[:1] if frames > 1 else video[:, :, 0].float(), float("inf"))
        order = torch.cat([first, changed]).flatten()[None]
        return choices.top(order, self._of_video(frames, tokens)).view(frames, tokens)
