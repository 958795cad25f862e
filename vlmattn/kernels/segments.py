"""Attention over disjoint sets of keys that lie in different places, merged exactly by log-sum-exp.

For segments g with outputs o_g and log-sum-exps lse_g: out = sum_g exp(lse_g - lse) o_g, lse = logsumexp_g(lse_g). So
keys that stay (a map, a prompt) and keys that come and go need no common buffer, and nothing is copied per call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Flash attention: output ``[batch, heads, query, dim]`` and natural log-sum-exp ``[batch, heads, query]``."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    elif query.dtype == torch.float32:  # flash kernels are for half precision
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    return out, lse[..., : query.shape[2]]


class Merger:
    """What query rows make of the keys they have met so far: output and log-sum-exp, merged piece by piece."""

    def __init__(self, query: Tensor, dim: int) -> None:
        self._shape = (*query.shape[:3], dim)
        self.total = query.new_full(query.shape[:3], float("-inf"), dtype=at_least_float(query.dtype))
        self.out: Tensor | None = None

    def add(self, top: int, out: Tensor, lse: Tensor) -> None:
        """Merge one more disjoint set of keys: outputs and log-sum-exp (-inf: no key) of the rows from ``top`` on."""
        out = out.to(self.total.dtype)
        if self.out is None and out.shape == self._shape:
            self.total, self.out = lse, torch.where(lse[..., None] > float("-inf"), out, 0.0)
            return
        if self.out is None:
            self.out = out.new_zeros(self._shape)
        rows = slice(top, top + out.shape[2])
        total, so_far = self.total[:, :, rows], self.out[:, :, rows]
        new = torch.logaddexp(total, lse)
        old_share = torch.where(new > float("-inf"), (total - new).exp(), 0.0)[..., None]
        new_share = torch.where(new > float("-inf"), (lse - new).exp(), 0.0)[..., None]
        so_far.mul_(old_share).add_(out * new_share)
        total.copy_(new)


def at_least_float(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which pieces are merged."""
    return torch.promote_types(dtype, torch.float32)


def attend(query: Tensor, segments: Sequence[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """Attention of all query rows to the keys of all segments, with no mask.

    Args:
        query: ``[batch, heads, query, dim]``.
        segments: keys and values ``[batch or 1, heads, key, dim]``. One of batch 1 serves all rows of the batch as it
            is, and one of another dtype (a cache in half precision) is read in its own.
        scale: of the scores, usually ``dim ** -0.5``.

    Returns:
        ``[batch, heads, query, dim]`` in the dtype of ``query``.
    """
    batch, heads, rows, _ = query.shape
    merger = Merger(query, segments[0][1].shape[-1])
    for key, value in segments:
        asking = query.to(key.dtype)
        shared = len(key) == 1 and batch > 1
        if shared:  # the rows of all queries side by side
            asking = asking.transpose(0, 1).flatten(1, 2)[None]
        out, lse = flash(asking, key, value, scale)
        if shared:
            out = out.view(heads, batch, rows, -1).transpose(0, 1)
            lse = lse.view(heads, batch, rows).transpose(0, 1)
        merger.add(0, out, lse.to(merger.total.dtype))
    assert merger.out is not None
    return merger.out.to(query.dtype)
