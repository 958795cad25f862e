"""Primary and secondary sinks, by how long they point where the first token points (arXiv 2512.22213)."""

from __future__ import annotations

import torch
from torch import Tensor

_PRIMARY, _SECONDARY = 0.6, 0.12  # least share of the layers a sink lives (its code has fixed counts for deep models)


def split_levels(norms: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Primary and secondary sinks, bool ``[layer, prompt, token]`` each.

    Args:
        norms: of the first token as it enters each layer, and of what the decoder returns, ``[prompt, layer + 1]``.
            Sinks are looked for between its largest rise and its largest fall.
        near: which tokens point where the first one does as they enter a layer, bool ``[layer, prompt, token]``.
    """
    rise = norms.diff(dim=1)  # [prompt, layer]
    layer = torch.arange(rise.shape[1])
    start = rise.argmax(1, keepdim=True) + 1
    stop = rise.masked_fill(layer < start, torch.inf).argmin(1, keepdim=True) + 1
    high = ((layer >= start) & (layer < stop)).T
    sinks = near & high[..., None]
    life = sinks.sum(0) / len(sinks)
    return sinks & (life >= _PRIMARY), sinks & (life >= _SECONDARY) & (life < _PRIMARY)
