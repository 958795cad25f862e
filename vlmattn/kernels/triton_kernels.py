"""The two Triton kernels of ``triton_decode``, which says what they do and calls them."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _table(POINTER, b, stride_b, slot, live, other):
    """Values ``[BLOCK_N]`` of a table ``[batch, key]``."""
    return tl.load(POINTER + b * stride_b + slot, mask=live, other=other)


@triton.jit
def _table_of_heads(POINTER, b, stride_b, head, stride_h, slot, live, other, SHARED: tl.constexpr):
    """Values of a table ``[batch, heads, key]``: ``[1, BLOCK_N]`` if heads share them, else ``[BLOCK_M, BLOCK_N]``."""
    if SHARED:
        found = tl.load(POINTER + b * stride_b + slot, mask=live, other=other)[None, :]
    else:
        place = b * stride_b + head[:, None] * stride_h + slot[None, :]
        found = tl.load(POINTER + place, mask=live[None, :], other=other)
    return found.to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "keys", "split", "offset"])
def split_kernel(
    Q, K, V, OUT, PARTIAL, LSE, GROUP, WEIGHT, MASK, SCALE, LIFT, BIAS, LOGIT_ROW, SLOT,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_wb, stride_mb, stride_mt, stride_cb, stride_ch, stride_lb, stride_lh, stride_bb, stride_bh,
    stride_sb, stride_sh, tokens, keys, split, offset, scale, softcap, floor,
    GROUPS: tl.constexpr, WEIGHTED: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, MASK_OF_ROWS: tl.constexpr, INDEXED: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_LIFT: tl.constexpr, HAS_BIAS: tl.constexpr, OF_HEADS: tl.constexpr,
    HAS_LOGIT_ROW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One split of the keys, one KV head, one tile of virtual rows.

    MASKED: 0 no mask, 1 bool, 2 additive (hidden up to ``floor``). WHOLE: there is one split and no group, and the
    output is written at once.
    """
    number = tl.program_id(0)
    tiles = tl.cdiv(tokens * REPEAT * GROUPS * (2 if WEIGHTED else 1), BLOCK_M)
    kv_head = tl.program_id(1) // tiles
    tile = tl.program_id(1) % tiles
    b = tl.program_id(2).to(tl.int64)
    virtual: tl.constexpr = GROUPS * (2 if WEIGHTED else 1)
    rows = tokens * REPEAT * virtual

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < rows
    token = row // (REPEAT * virtual)
    head = kv_head * REPEAT + (row // virtual) % REPEAT
    group = row % GROUPS
    weighted = row % virtual >= GROUPS
    d = tl.arange(0, BLOCK_D)
    q = tl.load(
        Q + b * stride_qb + head[:, None] * stride_qh + token[:, None] * stride_qt + d[None, :],
        mask=real[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    low = number * split
    high = tl.minimum(low + split, keys)
    if CAUSAL and not INDEXED:  # keys behind the last row of the tile are seen by none
        last = (tile * BLOCK_M + BLOCK_M - 1) // (REPEAT * virtual)
        high = tl.minimum(high, offset + tl.minimum(last, tokens - 1) + 1)
    edited = real
    if HAS_LOGIT_ROW:
        edited = tl.load(LOGIT_ROW + b * tokens + token, mask=real, other=0) != 0

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(low, high, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        live = slot < high
        if INDEXED:
            slot = tl.load(SLOT + b * stride_sb + kv_head * stride_sh + slot, mask=live, other=-1)
            live = slot >= 0
            slot = tl.where(live, slot, 0)
        place = slot.to(tl.int64)
        k = tl.load(
            K + b * stride_kb + kv_head * stride_kh + place[None, :] * stride_ks + d[:, None],
            mask=live[None, :] & (d < DIM)[:, None],
            other=0.0,
        )
        if UPCAST:
            s = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision="ieee") * scale
        else:
            s = tl.dot(q, k) * scale
        if HAS_SOFTCAP:
            s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1)
        if HAS_SCALE or HAS_LIFT or HAS_BIAS:
            new = s
            if HAS_SCALE:
                new *= _table_of_heads(SCALE, b, stride_cb, head, stride_ch, slot, live, 1.0, not OF_HEADS)
            if HAS_LIFT:
                new += tl.abs(s) * _table_of_heads(LIFT, b, stride_lb, head, stride_lh, slot, live, 0.0, not OF_HEADS)
            if HAS_BIAS:
                new += _table_of_heads(BIAS, b, stride_bb, head, stride_bh, slot, live, 0.0, not OF_HEADS)
            if HAS_LOGIT_ROW:
                new = tl.where(edited[:, None], new, s)
            s = new
        seen = live[None, :] & real[:, None]
        if CAUSAL:
            seen = seen & (slot[None, :] <= offset + token[:, None])
        if MASKED:
            if MASK_OF_ROWS:
                entry = tl.load(
                    MASK + b * stride_mb + token[:, None] * stride_mt + slot[None, :],
                    mask=live[None, :] & real[:, None],
                    other=0,
                )
            else:
                entry = _table(MASK, b, stride_mb, slot, live, 0)[None, :]
            if MASKED == 1:
                seen = seen & (entry != 0)
            else:
                entry = entry.to(tl.float32)
                seen = seen & (entry > floor)
                s += tl.where(entry > floor, entry, 0.0)
        if GROUPS > 1:
            seen = seen & (_table(GROUP, b, stride_gb, slot, live, 255)[None, :] == group[:, None])
        if WEIGHTED:
            weight = _table(WEIGHT, b, stride_wb, slot, live, 0.0).to(tl.float32)
            seen = seen & ((weight > 0)[None, :] | ~weighted[:, None])
            s += tl.where(weighted[:, None], tl.log(tl.where(weight > 0, weight, 1.0))[None, :], 0.0)
        s = tl.where(seen, s * _LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(
            V + b * stride_vb + kv_head * stride_vh + place[:, None] * stride_vs + d[None, :],
            mask=live[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        acc *= shrink[:, None]
        if UPCAST:  # noqa: SIM108
            acc = tl.dot(p, v.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(p.to(v.dtype), v, acc)
        top = new_top

    some = total > 0
    safe_total = tl.where(some, total, 1.0)
    o = acc / safe_total[:, None]
    if WHOLE:
        heads = REPEAT * (tl.num_programs(1) // tiles)
        place = ((b * tokens + token) * heads + head)[:, None] * DIM + d[None, :]
        tl.store(OUT + place, o.to(OUT.dtype.element_ty), mask=real[:, None] & (d < DIM)[None, :])
    else:
        kv_heads = tl.num_programs(1) // tiles
        base = ((b * kv_heads + kv_head) * tl.num_programs(0) + number) * rows
        tl.store(LSE + base + row, tl.where(some, top + tl.log2(safe_total), float("-inf")), mask=real)
        tl.store(  # rows that saw nothing leave no output
            PARTIAL + (base + row)[:, None] * DIM + d[None, :], o, mask=(real & some)[:, None] & (d < DIM)[None, :]
        )


@triton.jit(do_not_specialize=["tokens", "splits"])
def merge_kernel(
    PARTIAL, LSE, OUT, PLAN, GAIN_ROW, GAMMA, SINK, HEAD, HEAD_ROW, stride_eb, tokens, splits,
    GROUPS: tl.constexpr, WEIGHTED: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    MOVES: tl.constexpr, GATES: tl.constexpr, RENORMALISE: tl.constexpr, GIVEN: tl.constexpr,
    HAS_GAIN_ROW: tl.constexpr, HAS_SINK: tl.constexpr, HAS_HEAD: tl.constexpr, HAS_HEAD_ROW: tl.constexpr,
):  # fmt: skip
    """One head of one query row: merge the splits, decide the gains, add the groups.

    MOVES: PLAN holds a ``GainPlan`` (rows taken, given, scale, then the gates' weights with their bound at the end).
    GIVEN: GAMMA holds the gains.
    """
    head = tl.program_id(0)
    token = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    virtual: tl.constexpr = GROUPS * (2 if WEIGHTED else 1)
    kv_head = head // REPEAT
    kv_heads = tl.num_programs(0) // REPEAT
    rows = tokens * REPEAT * virtual
    base = (b * kv_heads + kv_head) * splits * rows + (token * REPEAT + head % REPEAT) * virtual
    g = tl.arange(0, BLOCK_G)
    number = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    there = g < virtual

    lse = tl.load(
        LSE + base + number[:, None] * rows + g[None, :],
        mask=(number < splits)[:, None] & there[None, :],
        other=float("-inf"),
    )
    top = tl.max(tl.max(lse, 0), 0)
    if HAS_SINK:
        sink = tl.load(SINK + head).to(tl.float32) * _LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    z = tl.sum(tl.exp2(lse - top), 0)
    whole = tl.sum(tl.where(g < GROUPS, z, 0.0), 0)  # weighted rows are the same keys once more
    if HAS_SINK:
        whole += tl.exp2(sink - top)
    whole = tl.where(whole > 0, whole, 1.0)
    gain = tl.where(g < GROUPS, 1.0, 0.0)
    line = b * tokens + token
    if MOVES:
        mass = z / whole
        taken = tl.load(PLAN + g, mask=there, other=0.0)
        given = tl.load(PLAN + BLOCK_G + 1 + g, mask=there, other=0.0)
        room = tl.sum(given * mass, 0)
        on = room > 1e-20
        for gate in tl.static_range(GATES):
            weigh = tl.load(PLAN + (3 + gate) * (BLOCK_G + 1) + g, mask=there, other=0.0)
            bound = tl.load(PLAN + (3 + gate) * (BLOCK_G + 1) + BLOCK_G)
            on = on & (tl.sum(weigh * mass, 0) >= bound)
        moved = 1 - taken + given * tl.sum(taken * mass, 0) / tl.where(room > 1e-20, room, 1.0)
        moved = tl.where(on, moved, 1.0) * tl.load(PLAN + 2 * (BLOCK_G + 1) + g, mask=there, other=0.0)
        if RENORMALISE:
            after = tl.sum(moved * mass, 0)
            moved *= tl.where(after > 0, tl.sum(mass, 0) / tl.where(after > 0, after, 1.0), 1.0)
        if HAS_GAIN_ROW:
            moved = tl.where(tl.load(GAIN_ROW + line) != 0, moved, 1.0)
        gain = tl.where(there, moved, 0.0)
    if GIVEN:
        gain = tl.load(GAMMA + ((b * tl.num_programs(0) + head) * tokens + token) * virtual + g, mask=there, other=0.0)
    out = tl.zeros([BLOCK_D], tl.float32)
    for index in range(0, splits):
        begin = base + index * rows
        part = tl.load(LSE + begin + g, mask=there, other=float("-inf"))
        o = tl.load(
            PARTIAL + (begin + g)[:, None] * DIM + d[None, :],
            mask=(part > float("-inf"))[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        out += tl.sum(o * (tl.exp2(part - top) / whole * gain)[:, None], 0)
    if HAS_HEAD:
        scaled = out * tl.load(HEAD + b * stride_eb + head).to(tl.float32)
        if HAS_HEAD_ROW:
            scaled = tl.where(tl.load(HEAD_ROW + line) != 0, scaled, out)
        out = scaled
    tl.store(OUT + (line * tl.num_programs(0) + head) * DIM + d, out.to(OUT.dtype.element_ty), mask=d < DIM)
