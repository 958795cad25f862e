"""Edited attention of a few query rows against a long cache, as two Triton kernels (CUDA and ROCm).

Split-KV flash decoding in which the groups of an edit are virtual query rows: tile row (token, head, group) is the
query of that head and sees the keys of that group only, so every row is an ordinary online softmax and costs hardly a
register more than plain decoding; the padding of the tile to 16 rows holds them. The first kernel leaves (o_g, lse_g)
for each split of the keys; the second merges the splits, turns lse_g into masses M_g, decides the gains and writes

    out = eta_h sum_g gamma_g M_g o_g

Groups that occur in no key of a split move no bytes. Group weights w_j (``BoostPlan``) are G more virtual rows whose
scores carry log w_j. Without groups (G = 1) the same code is plain attention.

``TRITON_INTERPRET=1``, set before this module is imported, runs it on the CPU (for tests).
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from vlmattn.kernels.edit import AttentionEdit, GainPart, LogitPart, Rows, scale_heads, select_gains
from vlmattn.kernels.plans import GainPlan
from vlmattn.kernels.problem import Problem
from vlmattn.kernels.triton_kernels import merge_kernel, split_kernel
from vlmattn.kernels.visibility import Visibility, floor_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_GROUPS = 4
MOST_DIM = 256
_DTYPES = (torch.bfloat16, torch.float16)
MOST_SPLITS = 32


def supports(problem: Problem) -> str | None:
    """None if ``attention`` can run this, else what is not allowed, in words."""
    return _tensors_not_allowed(problem) or _edit_not_allowed(problem)


def _tensors_not_allowed(problem: Problem) -> str | None:
    query, key, value, sinks = problem.query, problem.key, problem.value, problem.sinks
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        return f"it needs query [batch, heads, query, dim] and key, value [batch, kv_heads, key, dim], got {shapes}"
    batch, heads, _, dim = query.shape
    if key.shape[0] != batch or key.shape[3] != dim or heads % key.shape[1]:
        return (
            f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit: same batch and dim, and heads a"
            " multiple of kv_heads"
        )
    if dim > MOST_DIM:
        return f"it runs head dimensions up to {MOST_DIM}, got {dim}"
    if query.dtype not in _DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"it runs bfloat16 and float16, all alike, got {query.dtype}, {key.dtype}, {value.dtype}"
    if any(tensor.stride(-1) != 1 for tensor in (query, key, value)):
        return "the last dimension of query, key and value must be contiguous"
    if query.device.type != "cuda" and not INTERPRETED:
        return f"it runs on CUDA and ROCm devices (elsewhere with TRITON_INTERPRET=1 only), got {query.device.type}"
    if key.device != query.device or value.device != query.device:
        return f"query, key and value must be on one device, got {query.device}, {key.device}, {value.device}"
    if sinks is not None and sinks.shape != (heads,):
        return f"sink logits must be [{heads}], one per head, got {tuple(sinks.shape)}"
    return None


def _edit_not_allowed(problem: Problem) -> str | None:
    see, edit, several = problem.visibility, problem.edit, problem.rows > 1
    if see.mask is not None and see.mask.shape[1] != 1:
        return "it needs one mask for all heads"
    if len(edit.logit) > 1 or any(part.guide is not None for part in edit.logit):
        return "it runs at most one logit part, without a mean over heads"
    if any(part.heads is not None or part.mix for part in edit.mask):
        return "it runs mask parts of all heads, and no mixtures"
    if several and len(edit.mask):
        return "it runs mask parts for one query row only"
    if several and edit.keep is not None and not _is_causal(see, problem.rows):
        return "it keeps cache slots for several query rows under a causal mask only"
    if len(edit.gain) > 1:
        return f"it runs at most one group gain, got {len(edit.gain)}"
    if len(edit.gain) and edit.gain[0].plan.groups > MOST_GROUPS:
        return f"it runs up to {MOST_GROUPS} groups, got {edit.gain[0].plan.groups}"
    if edit.read is not None and (edit.read.ndim != 3 or edit.read.shape[:2] != problem.key.shape[:2]):
        return f"slots to read must be [batch, kv_heads, n], got {tuple(edit.read.shape)}"
    return None


def _is_causal(see: Visibility, rows: int) -> bool:
    """Several rows whose mask need not be read: causal, and padding."""
    return rows > 1 and (see.mask is None or (see.plain and see.offset is not None))


def attention(problem: Problem, splits: int | None = None) -> Tensor:
    """Edited attention ``[batch, heads, query, dim]``, head gains included, for what ``supports`` accepts.

    Query, key and value may have any strides but the last.

    Args:
        splits: parts of the keys that run side by side; None = enough to fill the device.
    """
    query, key, value, see, edit = problem.query, problem.key, problem.value, problem.visibility, problem.edit
    softcap, sinks = problem.softcap, problem.sinks
    batch, heads, tokens, dim = query.shape
    kv_heads, repeat = key.shape[1], heads // key.shape[1]
    part = edit.gain[0] if len(edit.gain) else None
    groups = 1 if part is None else part.plan.groups
    weight = None if part is None or isinstance(part.plan, GainPlan) else part.weight
    group, weight, slots = (
        None if table is None else _readable(table)
        for table in (None if part is None else part.groups, weight, edit.read)
    )
    rows = tokens * repeat * groups * (1 if weight is None else 2)
    tile, block = tile_rows(rows), block_keys(dim)
    tiles = triton.cdiv(rows, tile)
    keys = key.shape[2] if slots is None else slots.shape[2]
    wanted = splits or _splits(query.device, batch * kv_heads * tiles, keys)
    length = triton.cdiv(triton.cdiv(keys, wanted), block) * block
    count = triton.cdiv(keys, length)
    whole = count == 1 and part is None and sinks is None
    out = query.new_empty(batch, tokens, heads, dim)
    partial = lse = query
    if not whole:
        partial = query.new_empty(batch, kv_heads, count, rows, dim, dtype=torch.float32)
        lse = query.new_empty(batch, kv_heads, count, rows, dtype=torch.float32)
    mask, bias = _one_row_mask(problem) if tokens == 1 else _mask_of_rows(see, edit)
    floor = floor_of(mask.dtype) if mask is not None and mask.is_floating_point() else None
    scores = _Scores.of(edit, bias, heads)
    split_kernel[(count, kv_heads * tiles, batch)](
        query, key, value, out, partial, lse, *_given(query, group, weight, mask, *scores.tables, scores.rows, slots),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *map(_batch_stride, (group, weight, mask)),
        0 if mask is None else mask.stride(1), *scores.strides, *((0, 0) if slots is None else slots.stride()[:2]),
        tokens, keys, length, 0 if see.mask is None else see.offset or 0, problem.scale, softcap or 1.0,
        floor or 0.0,
        GROUPS=groups, WEIGHTED=weight is not None, REPEAT=repeat, DIM=dim, BLOCK_M=tile, BLOCK_N=block,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), CAUSAL=_is_causal(see, tokens),
        MASKED=0 if mask is None else 1 if floor is None else 2, MASK_OF_ROWS=mask is not None and mask.shape[1] > 1,
        INDEXED=slots is not None, HAS_SCALE=scores.tables[0] is not None, HAS_LIFT=scores.tables[1] is not None,
        HAS_BIAS=scores.tables[2] is not None, OF_HEADS=scores.of_heads, HAS_LOGIT_ROW=scores.rows is not None,
        HAS_SOFTCAP=softcap is not None, WHOLE=whole, UPCAST=INTERPRETED,
        num_warps=warps(tile), num_stages=stages(_target(query.device), dim),
    )  # fmt: skip
    if not whole:
        edit = _merge(out, partial, lse, edit, sinks, weight is not None)
    return scale_heads(edit, out.transpose(1, 2))


def _merge(
    out: Tensor, partial: Tensor, lse: Tensor, edit: AttentionEdit, sinks: Tensor | None, weighted: bool
) -> AttentionEdit:
    """Merge the splits into ``out`` ``[batch, query, heads, dim]``; returns the edit less the head gains that went in.

    Args:
        partial: float32 ``[batch, kv_heads, splits, virtual rows, dim]``; lse: base 2,
            ``[batch, kv_heads, splits, virtual rows]``.
    """
    batch, tokens, heads, dim = out.shape
    part = edit.gain[0] if len(edit.gain) else None
    groups, renormalise = 1, False
    plan = gamma = gain_row = None
    if part is not None:
        groups = part.plan.groups
        if isinstance(part.plan, GainPlan):
            plan, renormalise = (
                _plan_table(part.plan, triton.next_power_of_2(groups), out.device),
                part.plan.renormalise,
            )
            gain_row = None if part.rows is None else _row_flags(part.rows)
        else:
            gamma = _gains(part, lse, sinks, tokens, weighted)
    head = edit.head_gain[0] if len(edit.head_gain) and edit.head_gain[0].offset is None else None
    gain = None if head is None else head.gain.contiguous()
    head_row = None if head is None or head.rows is None else _row_flags(head.rows)
    merge_kernel[(heads, tokens, batch)](
        partial, lse, out, *_given(out, plan, gain_row, gamma, sinks, gain, head_row), _batch_stride(gain),
        tokens, lse.shape[2],
        GROUPS=groups, WEIGHTED=weighted, REPEAT=heads // lse.shape[1], DIM=dim,
        BLOCK_G=triton.next_power_of_2(groups * (1 + weighted)), BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_S=max(MOST_SPLITS, triton.next_power_of_2(lse.shape[2])), MOVES=plan is not None,
        GATES=0 if plan is None else len(plan) - 3, RENORMALISE=renormalise, GIVEN=gamma is not None,
        HAS_GAIN_ROW=gain_row is not None, HAS_SINK=sinks is not None, HAS_HEAD=gain is not None,
        HAS_HEAD_ROW=head_row is not None,
    )  # fmt: skip
    return edit if head is None else replace(edit, head_gain=edit.head_gain[1:])


def _given(placeholder: Tensor, *tables: Tensor | None) -> tuple[Tensor, ...]:
    """Kernels take a pointer for everything; what they are told not to read may be any."""
    return tuple(placeholder if table is None else table for table in tables)


@dataclass(frozen=True, eq=False)
class _Scores:
    """The logit part as the kernel reads it: scale, lift and bias ``[batch, key]`` or ``[batch, heads, key]``, or None.

    ``rows``: uint8 ``[batch, query]``, where they apply.
    """

    tables: tuple[Tensor | None, Tensor | None, Tensor | None]
    of_heads: bool
    rows: Tensor | None

    @classmethod
    def of(cls, edit: AttentionEdit, opened: Tensor | None, heads: int) -> _Scores:
        """``opened``: bias ``[batch, key]`` of keys that a mask part opens in the one query row."""
        part = edit.logit[0] if len(edit.logit) else LogitPart()
        tables, rows = (part.scale, part.lift, part.bias), None if part.rows is None else _row_flags(part.rows)
        if opened is not None:  # one query row: where the part does not apply its tables are neutral
            on = None if part.rows is None else part.rows.mask
            scale, lift, bias = (
                table
                if table is None or on is None
                else torch.where(on if table.ndim == 2 else on[:, None], table, neutral)
                for table, neutral in zip(tables, (1.0, 0.0, 0.0), strict=True)
            )
            more = opened if bias is None or bias.ndim == 2 else opened[:, None]
            tables, rows = (scale, lift, more if bias is None else bias + more), None
        of_heads = any(table is not None and table.ndim == 3 for table in tables)
        if of_heads:
            tables = tuple(  # type: ignore[assignment]
                table[:, None].expand(-1, heads, -1) if table is not None and table.ndim == 2 else table
                for table in tables
            )
        scale, lift, bias = (None if table is None else _readable(table) for table in tables)
        return cls((scale, lift, bias), of_heads, rows)

    @property
    def strides(self) -> tuple[int, ...]:
        found: list[int] = []
        for table in self.tables:
            found += [_batch_stride(table), table.stride(1) if table is not None and self.of_heads else 0]
        return tuple(found)


def _mask_of_rows(see: Visibility, edit: AttentionEdit) -> tuple[Tensor | None, None]:
    """Mask of several query rows: padding and kept slots ``[batch, 1, key]``, or by row ``[batch, query, key]``."""
    if see.mask is not None and not _is_causal(see, 2):
        mask = _readable(see.mask[:, 0])
        return (mask[:, :1] if mask.stride(1) == 0 else mask), None  # one mask for all rows: a camera against its map
    kept = see.real if see.mask is not None else None
    if edit.keep is not None:
        kept = edit.keep if kept is None else kept & edit.keep
    return None if kept is None else _readable(kept)[:, None], None


def _one_row_mask(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Mask ``[batch, 1, key]`` of one query row after the mask parts, and the bias ``[batch, key]`` of opened keys."""
    see, edit = problem.visibility, problem.edit
    if edit.keep is None and not len(edit.mask):
        return None if see.mask is None else _readable(see.mask[:, 0, :, : problem.key.shape[2]]), None
    mask = problem.mask(0, 1)
    shown = None if mask is None else mask.visible[:, 0, 0]
    bias = None if mask is None or mask.bias is None else mask.bias[:, 0, 0]
    openable = see.real
    if edit.keep is not None:
        shown = edit.keep if shown is None else shown & edit.keep
        openable = edit.keep if openable is None else openable & edit.keep
    for part in edit.mask:
        edges = part.edges()[:, 0, 0]
        before = torch.ones_like(edges) if shown is None else shown
        if part.weight == 0:
            shown = before & ~edges
            continue
        opened = edges & ~before if openable is None else edges & ~before & openable
        shown = before | opened
        if part.weight < 1:
            soft = torch.where(opened, math.log(part.weight), 0.0)
            bias = soft if bias is None else bias + soft
    assert shown is not None
    return _readable(shown)[:, None], bias


def _gains(part: GainPart, lse: Tensor, sinks: Tensor | None, tokens: int, weighted: bool) -> Tensor:
    """Gains ``[batch, heads, query, virtual]`` of a plan for all heads, from log-sum-exps (base 2) of the splits."""
    (batch, kv_heads), groups = lse.shape[:2], part.plan.groups
    virtual = groups * (1 + weighted)
    merged = (lse * math.log(2)).logsumexp(2).view(batch, kv_heads, tokens, -1, virtual)
    merged = merged.transpose(2, 3).reshape(batch, -1, tokens, virtual)
    everything = merged[..., :groups].logsumexp(-1, keepdim=True)
    if sinks is not None:
        everything = torch.logaddexp(everything, sinks.float()[:, None, None])
    mass = torch.where(everything > float("-inf"), (merged - everything).exp(), 0.0)
    gamma, delta = select_gains(part, mass[..., :groups], mass[..., groups:] if weighted else None)
    if weighted:
        gamma = torch.cat([gamma, torch.zeros_like(gamma) if delta is None else delta], -1)
    return gamma.contiguous()


@functools.lru_cache(maxsize=256)
def _plan_table(plan: GainPlan, width: int, device: torch.device) -> Tensor:
    """float32 ``[3 + gates, width + 1]``: taken, given, scale, and each gate's weights with its bound behind."""
    lines = [(plan.taken, 0.0), (plan.given, 0.0), (plan.scale or (1.0,) * plan.groups, 0.0)]
    lines += [(gate.weights, gate.bound) for gate in plan.gates]
    padding = (0.0,) * (width - plan.groups)
    return torch.tensor([(*values, *padding, last) for values, last in lines], device=device)


def _readable(table: Tensor) -> Tensor:
    """With a contiguous last dimension, bytes instead of bools."""
    table = table if table.stride(-1) == 1 or table.shape[-1] == 1 else table.contiguous()
    return table.view(torch.uint8) if table.dtype == torch.bool else table


def _row_flags(rows: Rows) -> Tensor:
    return _readable(rows.mask.contiguous())


def _batch_stride(table: Tensor | None) -> int:
    """0 if all rows share it."""
    return 0 if table is None or table.shape[0] == 1 else table.stride(0)


@functools.lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _splits(device: torch.device, tasks: int, keys: int) -> int:
    """Enough splits to fill the device twice, each of 256 keys at least."""
    return max(1, min(int(triton.cdiv(2 * _processors(device), tasks)), int(triton.cdiv(keys, 256)), MOST_SPLITS))


@functools.lru_cache(maxsize=16)
def _target(device: torch.device) -> str:
    """What the kernels are compiled for: "sm_90", "gfx942", ..."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def tile_rows(rows: int) -> int:
    """Rows of a tile: a matrix instruction takes 16, and more than 64 spill."""
    return min(max(16, int(triton.next_power_of_2(rows))), 64)


def block_keys(dim: int) -> int:
    """Keys that are loaded at once."""
    return 32 if dim > 128 else 64


def warps(tile: int) -> int:
    """Four warps of a large tile would spill."""
    return 8 if tile > 32 else 4


def stages(target: str, dim: int) -> int:
    """Loads in flight: three where shared memory has room for them."""
    return 3 if target in ("sm_80", "sm_90") and dim <= 128 else 2
