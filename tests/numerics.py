"""How far two ways to compute the same may lie apart on any CPU, from the dtype and the size of what is added up."""

from __future__ import annotations

import torch
from torch import Tensor

# A tiny model of the tests: in each of 4 layers sums over a hidden size of 32 (before and after the attention), up to 64
# keys and an intermediate size of 64, one upon the other; a softmax multiplies what its scores are off by their size,
# about 3. Measured: a thirtieth of the bound.
TINY_MODEL = 4 * (32 + 32 + 64 + 64) * 3


def bound(dtype: torch.dtype, terms: int, scale: float = 1.0) -> float:
    """What rounding may change in a sum of ``terms`` terms whose partial sums are at most ``scale``, in any order."""
    return terms * torch.finfo(dtype).eps * scale


def size(values: Tensor) -> float:
    """The largest finite value."""
    return float(values.detach().abs().masked_fill(~values.isfinite(), 0).max()) if values.numel() else 0.0


def near(found: Tensor, wanted: Tensor, terms: int = TINY_MODEL, scale: float | None = None) -> None:
    """``found`` is ``wanted`` up to the rounding of sums of ``terms`` terms, as large as the largest value of ``wanted``."""
    limit = bound(found.dtype, terms, size(wanted) if scale is None else scale)
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit)
