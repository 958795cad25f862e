"""Dense edited attention. Used for one decode row, and for prefill in chunks of rows: never query x key of a prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmattn.kernels.edit import AttentionEdit, select_gains
from vlmattn.kernels.problem import Problem
from vlmattn.kernels.visibility import Mask, additive, hide


def attention(problem: Problem, start: int, stop: int) -> Tensor:
    """Edited attention ``[batch, heads, stop - start, dim]`` of query rows, without head gains; softmax in float32."""
    value = problem.value
    batch, kv_heads, keys, dim = value.shape
    attended = weights(problem, start, stop)
    if problem.dropout:
        attended = torch.nn.functional.dropout(attended, problem.dropout)
    packed = attended.to(value.dtype).view(batch, kv_heads, -1, keys)
    return (packed @ value).view(batch, -1, stop - start, dim)


def reading(problem: Problem) -> Tensor:
    """Attention ``[batch, heads, 1, dim]`` of one row that reads the slots ``edit.read`` and nothing else."""
    query, key, value, edit, mask = problem.query, problem.key, problem.value, problem.edit, problem.mask(0, 1)
    assert edit.read is not None
    batch, heads = query.shape[:2]
    kv_heads, keys = key.shape[1:3]
    slots = edit.read.long().clamp_min(0)
    seen = edit.read >= 0
    if problem.visibility.real is not None:
        seen = seen & problem.visibility.real[:, None].expand(-1, kv_heads, -1).gather(2, slots)
    bias = None
    if mask is not None:
        per_slot = (batch, kv_heads, keys)
        seen = seen & mask.visible[:, :1, 0].expand(per_slot).gather(2, slots)
        bias = None if mask.bias is None else mask.bias[:, :1, 0].expand(per_slot).gather(2, slots)
    key, value = (states.gather(2, slots[..., None].expand(-1, -1, -1, states.shape[-1])) for states in (key, value))
    packed = query.view(batch, kv_heads, heads // kv_heads, -1)
    added = additive(seen, query.dtype)
    added = added if bias is None else added + bias.to(query.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(packed, key, value, added[:, :, None], scale=problem.scale)
    return out.masked_fill(~seen.any(-1)[..., None, None], 0.0).view(batch, heads, 1, value.shape[-1])


def weights(problem: Problem, start: int, stop: int) -> Tensor:
    """Weights, float32 ``[batch, heads, stop - start, key]``, of query rows; head gains have no part in them."""
    query, edit = problem.query, problem.edit
    if (start, stop) != (0, problem.rows):
        query, edit = query[:, :, start:stop], edit.slice_rows(start, stop)
    query, edit = edit.shifted(query)
    batch, heads, rows, dim = query.shape
    kv_heads, keys = problem.key.shape[1:3]
    packed = query.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    score = (packed @ problem.key.transpose(-1, -2)).view(batch, heads, rows, keys).float() * problem.scale
    if problem.softcap is not None:
        score = problem.softcap * torch.tanh(score / problem.softcap)
    score, blind = _apply_masks(_edit_scores(score, edit), problem.mask(start, stop), problem.visibility.real, edit)
    if problem.sinks is not None:
        sink = problem.sinks.float()[:, None, None].expand(batch, heads, rows, 1)
        return _apply_gains(torch.cat([score, sink], -1).softmax(-1)[..., :-1], edit)
    found = score.softmax(-1)
    return _apply_gains(found if blind is None else found.masked_fill(blind, 0.0), edit)


def _per_head(values: Tensor) -> Tensor:
    """``[batch, key]`` or ``[batch, heads, key]`` to ``[batch, heads or 1, 1, key]``."""
    return values[:, None, None] if values.ndim == 2 else values[:, :, None]


def _edit_scores(score: Tensor, edit: AttentionEdit) -> Tensor:
    for part in edit.logit:
        new = score if part.scale is None else score * _per_head(part.scale)
        if part.lift is not None:
            new = new + _per_head(part.lift) * score.abs()
        if part.guide is not None:
            new = new + _per_head(part.guide) * score.abs().mean(1, keepdim=True)
        if part.bias is not None:
            new = new + _per_head(part.bias)
        score = new if part.rows is None else part.rows.where(new, score)
    return score


def _apply_masks(
    score: Tensor, mask: Mask | None, real: Tensor | None, edit: AttentionEdit
) -> tuple[Tensor, Tensor | None]:
    """Masked scores, and the rows that see nothing ``[batch, heads, query, 1]`` (None = there are none)."""
    if mask is not None and mask.bias is not None:
        score = score + mask.bias
    keep = edit.kept(*score.shape[1::2])
    if keep is None and len(edit.mask) == 0:
        return (score, None) if mask is None else (hide(score, mask.hidden), mask.blind)
    visible = None if mask is None else mask.visible
    openable = None if real is None else real[:, None, None]
    if keep is not None:
        keep = keep[:, :, None]
        visible = keep if visible is None else visible & keep
        openable = keep if openable is None else openable & keep
    if mask is not None and mask.reach is not None:
        openable = mask.reach if openable is None else openable & mask.reach
    for part in edit.mask:
        edges = part.edges()
        shown = torch.ones_like(edges) if visible is None else visible
        if part.weight == 0:
            visible = shown & ~edges
        else:
            opened = edges & ~shown if openable is None else edges & ~shown & openable
            if part.mix:
                opened = opened & shown.any(-1, keepdim=True)
                softer = score + _mix_bias(score, shown, opened, part.weight)
            else:
                softer = score + math.log(part.weight)
            score = torch.where(opened, softer, score)
            visible = shown | opened
    assert visible is not None
    return hide(score, ~visible), ~visible.any(-1, keepdim=True)


def _mix_bias(score: Tensor, shown: Tensor, opened: Tensor, weight: float) -> Tensor:
    """log(weight Z / (Z + (1 - weight) Z_E)) of each row: the bias that makes one softmax the mixture of two."""
    inside, outside = (hide(score, ~shown).logsumexp(-1), hide(score, ~opened).logsumexp(-1))
    soft = torch.logaddexp(inside, outside + math.log(max(1 - weight, 1e-30)))
    return (math.log(weight) + inside - soft)[..., None]


def _apply_gains(attended: Tensor, edit: AttentionEdit) -> Tensor:
    """Attention weights ``[batch, heads, query, key]`` after the group gains of an edit."""
    batch, heads, rows, keys = attended.shape
    for part in edit.gain:
        number = torch.arange(part.plan.groups, device=attended.device)
        member = (part.groups[:, None] == number[:, None]).to(attended.dtype)  # [batch, groups, key]
        flat = attended.reshape(batch, heads * rows, keys).transpose(1, 2)

        def masses(of: Tensor, flat: Tensor = flat) -> Tensor:
            return torch.bmm(of, flat).transpose(1, 2).view(batch, heads, rows, -1)

        weighted = None if part.weight is None else masses(member * part.weight[:, None])
        gamma, delta = select_gains(part, masses(member), weighted)
        gain = torch.bmm(gamma.reshape(batch, heads * rows, -1), member)
        if delta is not None and part.weight is not None:
            gain = gain + torch.bmm(delta.reshape(batch, heads * rows, -1), member) * part.weight[:, None]
        attended = attended * gain.view(attended.shape)
    return attended
