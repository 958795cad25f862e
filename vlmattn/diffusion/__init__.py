"""Fewer image tokens in models that write by denoising: schedules over steps and layers, rows that go, slots that go.

Experimental: tried on a toy denoiser and on tiny random models only.
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
