"""The oracle: AttentionEdit by its definition, in float64, one row after another. Slow on purpose.

Nothing here is shared with the fast backends: gains are applied key by key and mixtures as two softmaxes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmattn.kernels.edit import GainPart, LogitPart, MaskPart, Rows
from vlmattn.kernels.plans import BoostPlan, GainPlan, LevelPlan
from vlmattn.kernels.problem import Problem
from vlmattn.kernels.residual import Add, Near, Project, ResidualPart, Scale, Turn
from vlmattn.kernels.visibility import visible


def attention(problem: Problem) -> Tensor:
    """Edited attention, float64 ``[batch, heads, query, dim]``."""
    query, edit = problem.query.double(), problem.edit
    (batch, heads, rows, _), keys = query.shape, problem.key.shape[2]
    if edit.shift is not None:
        query = query + edit.shift.double()[:, None]
    repeat = heads // problem.key.shape[1]
    key, value = (states.double().repeat_interleave(repeat, 1) for states in (problem.key, problem.value))
    shown, bias = _mask(problem)
    out = torch.zeros(batch, heads, rows, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        real = shown.new_ones(keys) if problem.visibility.real is None else problem.visibility.real[b]
        if edit.keep is not None:
            real = real & edit.keep[b]
        for i in range(rows):
            scores = torch.stack([key[b, h] @ query[b, h, i] * problem.scale for h in range(heads)])
            if problem.softcap is not None:
                scores = problem.softcap * (scores / problem.softcap).tanh()
            for logit in edit.logit:
                if _applies(logit.rows, b, i):
                    scores = _edit_scores(scores, logit, b)
            scores = scores + bias[b, i]
            weights = torch.stack([_weights(problem, scores[h], shown[b, i], real, b, h, i) for h in range(heads)])
            for gain in edit.gain:
                if _applies(gain.rows, b, i):
                    weights = _gains(weights, gain, b)
            for h in range(heads):
                out[b, h, i] = _head_gains(problem, weights[h] @ value[b, h], b, h, i)
    return out


def _mask(problem: Problem) -> tuple[Tensor, Tensor]:
    """``[batch, query, key]``: what the unedited model sees (bool), and what its mask adds to scores (float64)."""
    mask, keys = problem.visibility.mask, problem.key.shape[2]
    if mask is None:
        mask = torch.ones(problem.rows, keys, dtype=torch.bool, device=problem.key.device)
        mask = (mask.tril() if problem.rows > 1 else mask)[None, None]
    mask = mask[..., :keys].expand(problem.query.shape[0], 1, problem.rows, keys)[:, 0]
    shown = visible(mask)
    bias = torch.zeros(shown.shape, dtype=torch.float64, device=mask.device)
    return shown, bias if mask.dtype == torch.bool else torch.where(shown, mask.double(), bias)


def _weights(problem: Problem, score: Tensor, shown: Tensor, real: Tensor, b: int, h: int, i: int) -> Tensor:
    """Attention weights ``[key]`` of one row and head before group gains."""
    edit, there, keys = problem.edit, real.clone(), len(score)
    if edit.read is not None:
        read = edit.read[b, h * edit.read.shape[1] // problem.query.shape[1]].tolist()
        there &= shown.new_tensor([j in read for j in range(keys)])
    openable, see = there, problem.visibility
    if see.window is not None:
        places = range(keys) if see.places is None else see.places[b].tolist()
        row = places[(see.offset or 0) + i]
        openable = there & shown.new_tensor([abs(row - places[j]) < see.window for j in range(keys)])
    sink = float("-inf") if problem.sinks is None else float(problem.sinks[h])
    return _softmax(score, shown & there, openable, edit.mask, b, h, i, sink)


def _head_gains(problem: Problem, result: Tensor, b: int, h: int, i: int) -> Tensor:
    """The output ``[dim]`` of one row and head after the head gains."""
    for head in problem.edit.head_gain:
        if _applies(head.rows, b, i):
            result = head.gain[b % len(head.gain), h].double() * result
            if head.offset is not None:
                result = result + head.offset[b % len(head.offset), h].double()
    return result


def _applies(rows: Rows | None, b: int, i: int) -> bool:
    return rows is None or bool(rows.mask[b, i])


def _edit_scores(scores: Tensor, part: LogitPart, b: int) -> Tensor:
    """Scores ``[heads, keys]`` of one row after a logit part."""

    def of_key(values: Tensor | None, h: int, default: float) -> Tensor | float:
        if values is None:
            return default
        return (values[b] if values.ndim == 2 else values[b, h]).double()

    mean = sum(abs(score) for score in scores) / len(scores)
    return torch.stack(
        [
            of_key(part.scale, h, 1.0) * score
            + of_key(part.lift, h, 0.0) * score.abs()
            + of_key(part.guide, h, 0.0) * mean
            + of_key(part.bias, h, 0.0)
            for h, score in enumerate(scores)
        ]
    )


def _softmax(
    score: Tensor, visible: Tensor, openable: Tensor, masks: tuple[MaskPart, ...], b: int, h: int, i: int, sink: float
) -> Tensor:
    """Weights of one row and head; a key counts ``counts`` times."""
    visible, counts = visible.clone(), torch.ones_like(score)
    for mask in masks:
        if mask.heads is not None and not mask.heads[b % len(mask.heads), h]:
            continue
        edge = torch.zeros_like(visible)
        for j in range(len(score)):
            row, key = int(mask.rows[b, i]), int(mask.keys[b, j])
            edge[j] = (
                row >= 0 and key >= 0 and {"any": True, "same": row == key, "different": row != key}[mask.relation]
            )
        if mask.weight == 0:
            visible &= ~edge
            continue
        opened = edge & ~visible & openable
        if mask.mix and visible.any():
            both = (1 - mask.weight) * _normal(score, visible, counts) + mask.weight * _normal(
                score, visible | opened, counts
            )
            alone = _normal(score, visible | opened, counts)
            seen = visible.nonzero()[0]
            for j in opened.nonzero().flatten():  # how often the key counts beside those that were visible
                counts[j] = (both[j] / alone[j]) / (both[seen] / alone[seen]) if alone[j] > 0 else 0.0
        elif not mask.mix:
            counts[opened] = mask.weight
        else:
            continue
        visible |= opened
    return _normal(score, visible, counts, sink)


def _normal(score: Tensor, visible: Tensor, counts: Tensor, sink: float = float("-inf")) -> Tensor:
    if not visible.any():
        return torch.zeros_like(score)
    top = max(float(score[visible].max()), sink)
    weights = counts * torch.exp(score - top) * visible
    return weights / (weights.sum() + math.exp(sink - top))


def _gains(weights: Tensor, part: GainPart, b: int) -> Tensor:
    """Weights ``[heads, keys]`` of one row after a gain part."""
    groups = part.groups[b]
    if isinstance(part.plan, BoostPlan):
        assert part.weight is not None
        return _boost(weights, groups, part.weight[b].double(), part.plan)
    if isinstance(part.plan, LevelPlan):
        return torch.stack([_level(row, groups, part.plan.strength) for row in weights])
    assert isinstance(part.plan, GainPlan)
    return torch.stack([_move(row, groups, part.plan) for row in weights])


def _move(weights: Tensor, groups: Tensor, plan: GainPlan) -> Tensor:
    """Take from every key of a source, share out in proportion to attention."""
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


def _boost(weights: Tensor, groups: Tensor, key_weight: Tensor, plan: BoostPlan) -> Tensor:
    heads = len(weights)
    top = int(heads * plan.share)

    def most(group: int) -> list[int]:
        mass = [round(float(row[groups == group].sum()), 5) for row in weights]
        return sorted(range(heads), key=lambda h: (-mass[h], h))[:top]

    first, second = most(1), most(2)
    plain = sum(float(weights[h][groups == 1].sum()) for h in first)
    boosted = sum(float((weights[h] * key_weight)[groups == 1].sum()) for h in first)
    changed = weights.clone()
    for h in range(heads):
        if h in first:
            changed[h][groups == 1] *= key_weight[groups == 1]
        if h in second and plain > 1e-20:
            changed[h][groups == 2] *= boosted / plain
        if changed[h].sum() > 0:
            changed[h] *= weights[h].sum() / changed[h].sum()
    return changed


def _level(weights: Tensor, groups: Tensor, strength: float) -> Tensor:
    sums = {int(g): float(weights[groups == g].sum()) for g in set(groups.tolist())}
    filled = {g: total for g, total in sums.items() if total > 1e-20}
    even = weights.clone()
    for g, total in filled.items():
        even[groups == g] *= float(weights.sum()) / len(filled) / total
    return (1 - strength) * weights + strength * even


def steered(x: Tensor, parts: tuple[ResidualPart, ...]) -> Tensor:
    """Hidden states after all parts, float64, row by row."""
    x = x.double().clone()
    for part in parts:
        for b in range(x.shape[0]):
            for i in range(x.shape[1]):
                if _applies(part.rows, b, i) and _near(part.gate, x[b, i]):
                    x[b, i] = _steered_row(x[b, i], part, b)
    return x


def _near(gate: Near | None, row: Tensor) -> bool:
    return gate is None or bool(_cosine(row, gate.direction.double()) >= gate.least)


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    found: Tensor = (one @ other) / (one.norm() * other.norm())
    return found


def _steered_row(row: Tensor, part: ResidualPart, b: int) -> Tensor:
    if isinstance(part, Add):
        vector = part.vector.double()
        added: Tensor = row + (vector if vector.ndim == 1 else vector[b if len(vector) > 1 else 0, 0])
        return added
    if isinstance(part, Scale):
        return row * part.factor
    if isinstance(part, Project):
        for direction in part.basis.double():
            row = row - (0 if part.onto else part.strength) * (row @ direction) * direction
        if part.onto:
            within = torch.stack([(row @ direction) * direction for direction in part.basis.double()]).sum(0)
            row = (1 - part.strength) * row + part.strength * within
        return row
    assert isinstance(part, Turn)
    pull, given = torch.zeros_like(row), part.directions.double()
    ways = given[b if len(given) > 1 else 0] if given.ndim == 3 else given
    for direction in ways:
        away = max(0.0, float(_cosine(row, -direction))) if part.opposed else 0.0
        pull = pull + part.strength * (1 + away) * direction / direction.norm() / len(ways)
    turned = row / row.norm() + pull
    found: Tensor = row.norm() * turned / turned.norm()
    return found
