"""VidCom2: more tokens for frames unlike the video, and in each the tokens unlike the rest (arXiv 2505.14454)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmattn.errors import UnsupportedError
from vlmattn.interventions.pruning.video import VideoPruning
from vlmattn.options import option
from vlmattn.registry import register

_WIDTHS = tuple(2.0**power for power in range(-3, 2))  # of the Gaussians (released)


@register(
    "vidcom2",
    paper="arXiv:2505.14454 (EMNLP 2025)",
    code="github.com/xuyang-liu16/VidCom2",
    faithful="golden (the choice)",
    parts="keep",
    cost="prefill: two distances a token; all layers run on the rest, from the first on. Decode: fewer keys",
    presets={"vidcom2": ("released default: a quarter of the tokens of each video", {})},
)
@dataclass(frozen=True, kw_only=True)
class VidCom2(VideoPruning):
    """Before the first layer keep the tokens of a video that are unlike its mean and that of their frame.

    With y the tokens of the video in the half of the channels that vary least, normalised, v the mean of all y, f_t
    that of frame t, G(y, c) = sum_{a = 1/8..2} exp(-|y - c|^2 / 2a):

        share of frame t:  keep_ratio (1 + p_t - mean p),   p = softmax_t(-mean_j G(y[t, j], v) / .01),   at most 1
        in each frame the round(share n) tokens, 1 at least, with the lowest G(y, v) + G(y, f_t) stay

    as the released code does. How many stay depends on the video. Kept tokens have their order and position ids. Images
    stay whole. Counts dropped tokens.
    """

    keep_ratio: float = option(0.25, 0, 1, "share of the tokens of each video that stays", source="released: .25")
    channels: float = option(0.5, 0, 1, "share of the channels that is looked at", source="released: .5")
    temperature: float = option(0.01, 1e-6, 1e6, "of the softmax over frames", source="released: .01")

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        raise UnsupportedError(
            "how many tokens vidcom2 keeps is known only once the video is read; leave it out of cost(), or measure it"
            " with vlmattn bench"
        )

    def pick_frames(self, video: Tensor) -> Tensor:
        frames, tokens, width = video.shape
        flat = video.float().flatten(0, 1)
        calm = flat.var(0, unbiased=False).topk(max(int(width * self.channels), 1), largest=False).indices
        unit = normalize(flat[:, calm].view(frames, tokens, -1), dim=-1)
        to_video, to_frame = _gaussians(unit, unit.mean((0, 1))), _gaussians(unit, unit.mean(1, keepdim=True))
        odd = -to_video.mean(1)
        weight = ((odd - odd.max()) / self.temperature).softmax(0)
        share = (self.keep_ratio * (1 + weight - weight.mean())).clamp_max(1)
        counts = (share * tokens).round().clamp(1, tokens)
        order = (to_video + to_frame).argsort(dim=1, stable=True).argsort(dim=1)
        return order < counts[:, None]


def _gaussians(tokens: Tensor, centre: Tensor) -> Tensor:
    distance = (tokens - centre).square().sum(-1)
    return torch.stack([torch.exp(-distance / (2 * width)) for width in _WIDTHS]).sum(0)
