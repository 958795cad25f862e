"""The oracle: AttentionEdit by its definition, in float64, one row and one head at a time. Slow on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmattn.kernels.edit import AttentionEdit, GainPlan, Rows


def attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, real: Tensor | None, edit: AttentionEdit, scale: float
) -> Tensor:
    """Edited attention, float64 ``[batch, heads, query, dim]``.

    Args:
        query: ``[batch, heads, query, dim]``; key, value: ``[batch, kv_heads, key, dim]``.
        visible: bool ``[batch, query, key]``, what the unedited model sees (causal and not padding).
        real: bool ``[batch, key]``, False for padding, which no mask part opens; None = no padding.
        scale: factor of the dot products.
    """
    batch, heads, rows, _ = query.shape
    repeat = heads // key.shape[1]
    out = torch.zeros(batch, heads, rows, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        padding = torch.zeros(key.shape[2], dtype=torch.bool) if real is None else ~real[b]
        for h in range(heads):
            k, v = key[b, h // repeat].double(), value[b, h // repeat].double()
            for i in range(rows):
                weights = _weights(query[b, h, i].double() @ k.T * scale, visible[b, i], padding, edit, b, h, i)
                out[b, h, i] = weights @ v
    return out


def _applies(rows: Rows | None, b: int, i: int) -> bool:
    return rows is None or bool(rows.mask[b, i])


def _of_key(values: Tensor | None, b: int, h: int, default: float) -> Tensor | float:
    if values is None:
        return default
    return (values[b] if values.ndim == 2 else values[b, h]).double()


def _weights(score: Tensor, visible: Tensor, padding: Tensor, edit: AttentionEdit, b: int, h: int, i: int) -> Tensor:
    for logit in edit.logit:
        if _applies(logit.rows, b, i):
            score = (
                _of_key(logit.scale, b, h, 1.0) * score
                + _of_key(logit.lift, b, h, 0.0) * score.abs()
                + _of_key(logit.bias, b, h, 0.0)
            )
    visible, counts = visible.clone(), torch.ones_like(score)
    for mask in edit.mask:
        for j in range(len(score)):
            row, key = int(mask.rows[b, i]), int(mask.keys[b, j])
            edge = row >= 0 and key >= 0 and {"any": True, "same": row == key, "different": row != key}[mask.relation]
            if edge and mask.weight == 0:
                visible[j] = False
            elif edge and not visible[j] and not padding[j]:
                visible[j], counts[j] = True, mask.weight
    if edit.keep is not None:
        visible &= edit.keep[b]
    if not visible.any():
        return torch.zeros_like(score)
    weights = counts * torch.exp(score - score[visible].max()) * visible
    weights = weights / weights.sum()
    for gain in edit.gain:
        if _applies(gain.rows, b, i):
            weights = _move(weights, gain.groups[b], gain.plan)
    for head in edit.head_gain:
        if _applies(head.rows, b, i):
            weights = weights * head.gain[b, h].double()
    return weights


def _move(weights: Tensor, groups: Tensor, plan: GainPlan) -> Tensor:
    """Gains applied key by key: take from every key of a source, share out in proportion to attention."""
    mass = [float(weights[groups == g].sum()) for g in range(plan.groups)]
    before, moved = weights.sum(), weights.clone()
    room = sum(d * m for d, m in zip(plan.given, mass, strict=True))
    pool = sum(t * m for t, m in zip(plan.taken, mass, strict=True))
    gates = (sum(w * m for w, m in zip(gate.weights, mass, strict=True)) >= gate.bound for gate in plan.gates)
    if room > 1e-20 and all(gates):
        for j in range(len(weights)):
            g = int(groups[j])
            moved[j] = weights[j] * (1 - plan.taken[g]) + pool * plan.given[g] * weights[j] / room
    if plan.scale is not None:
        moved = moved * torch.tensor([plan.scale[int(g)] for g in groups], dtype=moved.dtype)
    if plan.renormalise and moved.sum() > 0:
        moved = moved * before / moved.sum()
    return moved
