"""Exact group gains in prefill on stock flash attention: disjoint segments, merged by their log-sum-exp.

For the edited tail of the query rows and each key group g, flash attention over the keys of g gives (o_g, lse_g); then
M_g = exp(lse_g - lse) and out = sum_g gamma_g M_g o_g. Groups are disjoint and each is computed by itself: taking a
group out by subtraction would lose all digits next to a dominant sink. Memory is O(query x dim), never query x key.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlmattn.kernels.edit import GainPart, select_gains
from vlmattn.kernels.problem import Problem
from vlmattn.kernels.segments import Merger, flash
from vlmattn.kernels.visibility import Visibility

# Keys outside a group get an extra head dimension whose product with the query is _HIDDEN after scaling, so that any
# set of keys rides on kernels that take no mask. A group in which a row sees no key then has an lse near _HIDDEN.
_HIDDEN = -4096.0
_QUERY_SIDE = 64.0
_PAD = 8  # head dimensions stay a multiple of eight
_FEW = 64  # keys that are gathered rather than hiding all others


def supports(problem: Problem) -> str | None:
    """None if ``attention`` can run this, else the reason in words."""
    query, value, edit, see = problem.query, problem.value, problem.edit, problem.visibility
    if edit.mask or edit.logit or edit.keep is not None or edit.read is not None:
        return "it runs group gains only; this edit has mask, logit, keep or read parts"
    if problem.softcap is not None:
        return "flash attention does not cap scores"
    if len(edit.gain) != 1:
        return f"it runs exactly one group gain, got {len(edit.gain)}"
    if edit.gain[0].weight is not None:
        return "it does not run key weights"
    if not see.plain or see.offset is None:
        return "it needs a causal mask (with padding) and a known cache length"
    if query.shape[-1] != value.shape[-1]:
        return f"it needs values of the size of the queries, got {value.shape[-1]} and {query.shape[-1]}"
    if query.device.type not in ("cpu", "cuda"):
        return f"there is no flash attention with log-sum-exp on {query.device.type}"
    return None


def attention(problem: Problem, from_row: int) -> Tensor:
    """Edited attention ``[batch, heads, query, dim]`` of the query rows from ``from_row`` on, for what ``supports``
    accepts (head gains not applied); keys beyond the last row are not read."""
    (part,) = problem.edit.slice_rows(from_row, problem.rows).gain
    query, dim = problem.query[:, :, from_row:], problem.value.shape[-1]
    found = [Merger(query, dim) for _ in range(part.plan.groups)]
    for group, top, out, lse in _pieces(problem, part, from_row):
        found[group].add(top, out, lse)
    total = torch.stack([group.total for group in found], -1)
    everything = total.logsumexp(-1, keepdim=True)
    if problem.sinks is not None:
        everything = torch.logaddexp(everything, problem.sinks.float()[:, None, None])
    mass = torch.where(everything > float("-inf"), (total - everything).exp(), 0.0)  # a row that sees nothing: zeros
    gamma, _ = select_gains(part, mass)
    share = (gamma * mass)[..., None]
    out = query.new_zeros((*query.shape[:3], dim), dtype=torch.float32)
    for number, of in enumerate(found):
        if of.out is not None:
            out.addcmul_(of.out, share[..., number, :])
    return out.to(query.dtype)


def _pieces(problem: Problem, part: GainPart, from_row: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each group and each run of its keys: the group, the first row that looks there (of those from ``from_row``
    on), and output and log-sum-exp of the rows from there."""
    query = problem.query[:, :, from_row:]
    rows, repeat = query.shape[2], query.shape[1] // problem.key.shape[1]
    start = (problem.visibility.offset or 0) + from_row
    stop = start + rows
    key, value = (states[:, :, :stop].repeat_interleave(repeat, 1) for states in (problem.key, problem.value))
    for first, last, present in _runs(part, start, stop):
        keys, values = key[:, :, first:last], value[:, :, first:last]
        for group in present:
            member = _members(part, problem.visibility, group, first, last, alone=len(present) == 1)
            places = _places(member, query)
            if member is not None and places is not None and len(places) <= _FEW:
                if len(places):
                    yield group, 0, *_gathered(query, keys, values, member, places, start - first, problem.scale)
                continue
            if first < start:  # all rows see these keys
                blocks = [(0, rows, False)]
            else:  # the triangle, and the rows below it
                blocks = [(first - start, last - start, True), (last - start, rows, False)]
            for top, bottom, causal in blocks:
                if top < bottom:
                    yield group, top, *_flash(query[:, :, top:bottom], keys, values, member, causal, problem.scale)


def _runs(part: GainPart, start: int, stop: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Contiguous runs of keys up to ``stop``, cut at ``start``, with the groups that may occur in them."""
    everything = tuple(range(part.plan.groups))
    given = part.present or ()
    end = given[-1][1] if given else 0
    for first, last, present in (*given, (end, max(stop, end), everything)):
        for low, high in ((first, min(last, start)), (max(first, start), min(last, stop))):
            if low < high:
                yield low, high, present


def _members(part: GainPart, see: Visibility, group: int, first: int, last: int, alone: bool) -> Tensor | None:
    """bool ``[batch, keys]`` of the run: in this group and not padding; None when that is all of them."""
    member = None if alone else part.groups[:, first:last] == group
    if see.real is not None:
        real = see.real[:, first:last]
        member = real if member is None else member & real
    if member is not None and member.device.type == "cpu" and bool(member.all()):  # costs nothing to ask there
        return None
    return member


def _places(member: Tensor | None, query: Tensor) -> Tensor | None:
    """Places in the run that are members in some row of the batch; None = all, or not known.

    Asked on a CPU only: elsewhere the answer would have to be waited for.
    """
    return None if member is None or query.device.type != "cpu" else member.any(0).nonzero().flatten()


def _gathered(
    query: Tensor, key: Tensor, value: Tensor, member: Tensor, places: Tensor, before: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention over a few keys of a run: output and log-sum-exp ``[batch, heads, query]``.

    ``before``: keys of the run that come before the first query row's own.
    """
    score = (query.float() @ key[:, :, places].float().transpose(-1, -2)) * scale
    rows = torch.arange(before, before + query.shape[2])[:, None]
    score = score.masked_fill(~(member[:, None, None, places] & (places <= rows)), _HIDDEN)
    lse = score.logsumexp(-1)
    return (score - lse[..., None]).exp() @ value[:, :, places].float(), _nothing(lse)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, member: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Flash attention over the member keys: output and natural log-sum-exp ``[batch, heads, query]``."""
    dim = value.shape[-1]
    if member is not None:
        query = torch.nn.functional.pad(query, (0, _PAD))
        query[..., dim] = _QUERY_SIDE
        key = torch.nn.functional.pad(key, (0, _PAD))
        hidden = torch.where(member, 0.0, _HIDDEN / (_QUERY_SIDE * scale)).to(key.dtype)
        key[..., dim] = hidden[:, None]
        value = torch.nn.functional.pad(value, (0, _PAD))
    out, lse = flash(query, key, value, scale, causal)
    return out[..., :dim], _nothing(lse)


def _nothing(lse: Tensor) -> Tensor:
    """-inf where all keys were hidden."""
    return lse.masked_fill(lse < _HIDDEN / 2, float("-inf"))
