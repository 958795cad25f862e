"""Diffusion noise on preprocessed pixels, drawn row by row from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.errors import OptionError, quoted

STEPS = 1000


@dataclass(frozen=True)
class Noise:
    """x' = sqrt(a_t) x + sqrt(1 - a_t) eps,  eps ~ N(0, 1),  with VCD's sigmoid schedule.

    a_t = prod_{i <= t} (1 - b_i),  b_i = sigmoid(linspace(-6, 6, 1000)_i) (0.5e-2 - 1e-5) + 1e-5.

    Every row of a batch gets the noise that it would get alone, whatever else is in the batch.

    Attributes:
        step: t, 0 (almost none) .. 999 (almost only noise).
        seed: of the generator, which runs on the CPU so that devices agree.
    """

    step: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.step, int) or isinstance(self.step, bool) or not 0 <= self.step < STEPS:
            raise OptionError(f"the noise step must be a whole number within 0..{STEPS - 1}, got {quoted(self.step)}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not -(2**63) <= self.seed < 2**64:
            raise OptionError(f"the seed of the noise must be a whole number of 64 bits, got {quoted(self.seed)}")

    @property
    def coefficients(self) -> tuple[float, float]:
        """Factors of the image and of the noise."""
        steps = torch.linspace(-6, 6, STEPS)
        left = torch.cumprod(1 - (torch.sigmoid(steps) * (0.5e-2 - 1e-5) + 1e-5), 0)[self.step]
        return float(left.sqrt()), float((1 - left).sqrt())

    def __call__(self, pixels: Tensor) -> Tensor:
        """The noised pixels of one row: all of its images, however they are laid out."""
        draw = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float32)
        signal, noise = self.coefficients
        return (signal * pixels.float() + noise * draw.to(pixels.device)).to(pixels.dtype)
