"""Experimental: fewer image tokens in models that write by denoising.

Schedules over steps and layers, rows that go, slots that go.

Tried on a toy denoiser and on tiny random models only. Of the engine it uses public names alone: the request and token
map that ride on a cache, and how a cache with fewer slots answers.
"""

from vlmattn.diffusion.evicting import Evicted, evicted
from vlmattn.diffusion.gaze import Look, answer_attention
from vlmattn.diffusion.schedules import Constant, LateStep, LayerSkip, Least, Progressive, Schedule
from vlmattn.diffusion.thinning import Thinning, thinned

__all__ = [
    "Constant",
    "Evicted",
    "LateStep",
    "LayerSkip",
    "Least",
    "Look",
    "Progressive",
    "Schedule",
    "Thinning",
    "answer_attention",
    "evicted",
    "thinned",
]
