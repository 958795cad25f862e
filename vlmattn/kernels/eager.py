"""Dense edited attention. Used for one decode row, and for prefill in chunks of rows: never query x key of a prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmattn.kernels.edit import AttentionEdit, select_gamma


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    real: Tensor | None,
    edit: AttentionEdit,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Edited attention ``[batch, heads, query, dim]`` (head gains not applied); softmax and masses in float32.

    Args:
        query: ``[batch, heads, query, dim]``; key, value: ``[batch, kv_heads, key, dim]`` (grouped-query attention).
        mask: bool (True = visible) or additive float, ``[batch or 1, heads or 1, query, key]``; None = all visible.
        real: bool ``[batch, key]``, False for padding, which no mask part opens; None = no padding.
        dropout: probability of dropping an attention weight (training only).
    """
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    packed = query.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    score = (packed @ key.transpose(-1, -2)).view(batch, heads, rows, keys).float() * scale
    score = _edit_scores(score, edit)
    score, visible = _apply_masks(score, mask, real, edit)
    weights = score.softmax(-1)
    if visible is not None:
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)  # a row that sees nothing
    weights = _apply_gains(weights, edit)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    packed_weights = weights.to(value.dtype).view(batch, kv_heads, heads // kv_heads * rows, keys)
    return (packed_weights @ value).view(batch, heads, rows, value.shape[-1])


def _per_head(values: Tensor) -> Tensor:
    """``[batch, key]`` or ``[batch, heads, key]`` to ``[batch, heads or 1, 1, key]``."""
    return values[:, None, None] if values.ndim == 2 else values[:, :, None]


def _edit_scores(score: Tensor, edit: AttentionEdit) -> Tensor:
    for part in edit.logit:
        new = score if part.scale is None else score * _per_head(part.scale)
        if part.lift is not None:
            new = new + _per_head(part.lift) * score.abs()
        if part.bias is not None:
            new = new + _per_head(part.bias)
        score = new if part.rows is None else part.rows.where(new, score)
    return score


def _apply_masks(
    score: Tensor, mask: Tensor | None, real: Tensor | None, edit: AttentionEdit
) -> tuple[Tensor, Tensor | None]:
    """Masked scores and what is visible (None = everything)."""
    visible = None
    if mask is not None and mask.dtype == torch.bool:
        visible = mask
    elif mask is not None:
        visible = mask > torch.finfo(mask.dtype).min / 2
        score = score + mask.float().masked_fill(~visible, 0.0)
    for part in edit.mask:
        edges = part.edges()
        shown = torch.ones_like(edges) if visible is None else visible
        if part.weight == 0:
            visible = shown & ~edges
        else:
            opened = edges & ~shown if real is None else edges & ~shown & real[:, None, None]
            score = torch.where(opened, score + math.log(part.weight), score)
            visible = shown | opened
    if edit.keep is not None:
        keep = edit.keep[:, None, None]
        visible = keep if visible is None else visible & keep
    return (score, None) if visible is None else (_hide(score, visible), visible)


def _hide(score: Tensor, visible: Tensor) -> Tensor:
    return score.masked_fill(~visible, torch.finfo(score.dtype).min)


def _apply_gains(weights: Tensor, edit: AttentionEdit) -> Tensor:
    for part in edit.gain:
        member = part.groups[:, None, :, None] == torch.arange(part.plan.groups, device=weights.device)
        member = member.to(weights.dtype)  # [batch, 1, key, groups]
        gamma = select_gamma(part, weights @ member)
        weights = weights * (gamma @ member.transpose(-1, -2))
    return weights
