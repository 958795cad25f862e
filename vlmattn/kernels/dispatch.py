"""Which backend runs an edit. ``VLMATTN_BACKEND`` forces one, and a forced backend never falls back."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.kernels import eager, merge, reference
from vlmattn.kernels.edit import NO_EDIT, AttentionEdit, scale_heads
from vlmattn.kernels.visibility import Mask, Visibility

BACKENDS = ("reference", "eager", "merge", "triton")
_CHUNK = 2**24  # scores held at once by the dense backend in prefill: 64 MB
_FEW = 16  # query rows for which the decode kernel is chosen: one token, or a draft of assisted decoding
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    see: Visibility,
    edit: AttentionEdit,
    scale: float,
    dropout: float = 0.0,
    backend: str | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, str]:
    """Edited attention and the name of the backend that ran.

    Args:
        query: ``[batch, heads, query, dim]``; key, value: ``[batch, kv_heads, key, dim]``.
        see: what the unedited model sees.
        edit: what to change; see ``AttentionEdit``.
        backend: one of ``BACKENDS``; None takes ``VLMATTN_BACKEND`` or, without it, the fastest that can run the edit:
            ``triton`` for up to 16 query rows on a GPU in half precision, otherwise dense for one query row, flash segments
            (``merge``) for several, dense in chunks of rows for the rest.
        softcap: the model's scores become ``softcap tanh(s / softcap)`` before the edit.
        sinks: float ``[heads]``, the model's scores of one more key per head whose value is zero.

    Returns:
        output ``[batch, heads, query, dim]`` in the dtype of ``query``, and the backend's name.

    Raises:
        OptionError: no such backend.
        UnsupportedError: a forced backend cannot run this call.
    """
    name = backend or os.environ.get("VLMATTN_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise OptionError(f"VLMATTN_BACKEND must be one of {', '.join(BACKENDS)}; got '{name}'")
    if name != "reference":
        query, edit = edit.shifted(query)
    training = dropout > 0 or (torch.is_grad_enabled() and query.requires_grad)  # log-sum-exp has no gradient
    if name is None:
        if not training and _fits_triton(query, key, value, see, edit, sinks):
            name = "triton"
        elif training or query.shape[2] == 1 or merge.supports(edit, see, query, value, softcap):
            name = "eager"
        else:
            name = "merge"
    elif name in ("merge", "triton"):
        if name == "merge":
            reason = merge.supports(edit, see, query, value, softcap)
        else:
            reason = "it has no gradient" if training else _not_triton(query, key, value, see, edit, sinks)
        if reason:
            raise UnsupportedError(
                f"backend '{name}' was forced but cannot run this call: {reason}; unset VLMATTN_BACKEND"
            )
    if name == "reference":
        return _reference(query, key, value, see, edit, scale, softcap, sinks), name
    if name == "triton":
        from vlmattn.kernels import triton_decode

        return triton_decode.attention(query, key, value, see, edit, scale, softcap, sinks), name
    bare = replace(edit, head_gain=())
    if name == "merge":
        out = _merge(query, key, value, see, bare, scale, sinks)
    else:
        out = _eager(query, key, value, see, bare, scale, dropout, softcap, sinks)
    return scale_heads(edit, out), name


def _fits_triton(
    query: Tensor, key: Tensor, value: Tensor, see: Visibility, edit: AttentionEdit, sinks: Tensor | None
) -> bool:
    """A few rows of half precision on a GPU; on a CPU Triton is an interpreter, and only runs when forced."""
    few = query.device.type == "cuda" and query.shape[2] <= _FEW and query.dtype != torch.float32
    return few and _not_triton(query, key, value, see, edit, sinks) is None


def _not_triton(
    query: Tensor, key: Tensor, value: Tensor, see: Visibility, edit: AttentionEdit, sinks: Tensor | None
) -> str | None:
    """Why the decode kernel cannot run, if it cannot."""
    if not _HAS_TRITON:
        return "triton is not installed; pip install triton"
    from vlmattn.kernels import triton_decode

    return triton_decode.supports(query, key, value, see, edit, sinks)


def weights(
    query: Tensor,
    key: Tensor,
    see: Visibility,
    start: int,
    stop: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    edit: AttentionEdit = NO_EDIT,
) -> Tensor:
    """Attention weights, float32 ``[batch, heads, stop - start, key]``, of a few query rows; head gains are not in them."""
    rows, keys = query.shape[2], key.shape[2]
    query, edit = edit.shifted(query[:, :, start:stop])
    mask, part = _mask(see, start, stop, rows, keys, query.device), edit.slice_rows(start, stop)
    found = eager.weights(query, key, mask, see.real, part, scale, softcap, sinks)
    return eager.apply_gains(found, part)


def _mask(see: Visibility, start: int, stop: int, rows: int, keys: int, device: torch.device) -> Mask | None:
    mask = see.rows(start, stop, rows, keys, device)
    return None if mask is None else Mask.of(mask, see.reach(start, stop, keys, device))


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    see: Visibility,
    edit: AttentionEdit,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    rows, keys = query.shape[2], key.shape[2]
    mask = see.rows(0, rows, rows, keys, query.device)
    if mask is None:
        mask = torch.ones(1, keys, dtype=torch.bool, device=query.device)
    everyone = (query.shape[0], 1, rows, keys)
    bias = None
    if mask.dtype != torch.bool:
        additive, mask = mask, mask > torch.finfo(mask.dtype).min / 2
        bias = additive.masked_fill(~mask, 0.0).expand(everyone)[:, 0]
    visible = mask.expand(everyone)[:, 0]
    reach = see.reach(0, rows, keys, query.device)
    return reference.attention(query, key, value, visible, see.real, edit, scale, softcap, sinks, bias, reach).to(query)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    see: Visibility,
    edit: AttentionEdit,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    rows, keys = query.shape[2], key.shape[2]
    if rows == 1:
        mask = see.one_row or _mask(see, 0, 1, 1, keys, query.device)
        if edit.only_read and softcap is None and sinks is None and not dropout:
            return eager.reading(query, key, value, mask, see.real, edit, scale)
        return eager.attention(query, key, value, mask, see.real, edit, scale, dropout, softcap, sinks)
    stock = not dropout and softcap is None and sinks is None  # what SDPA can do
    first = min(edit.first_row, rows) if stock else 0
    out = [_plain(query[:, :, :first], key, value, see, rows, scale)] if first else []
    step = max(16, _CHUNK // (query.shape[0] * query.shape[1] * keys))
    for start in range(first, rows, step):
        stop = min(start + step, rows)
        mask = _mask(see, start, stop, rows, keys, query.device)
        part = edit.slice_rows(start, stop)
        rows_in = query[:, :, start:stop]
        out.append(eager.attention(rows_in, key, value, mask, see.real, part, scale, dropout, softcap, sinks))
    return torch.cat(out, 2)


def _merge(
    query: Tensor, key: Tensor, value: Tensor, see: Visibility, edit: AttentionEdit, scale: float, sinks: Tensor | None
) -> Tensor:
    rows = query.shape[2]
    first = min(edit.first_row, rows) if sinks is None else 0
    out = [_plain(query[:, :, :first], key, value, see, rows, scale)] if first else []
    if first < rows:
        tail = replace(see, offset=(see.offset or 0) + first)
        out.append(merge.attention(query[:, :, first:], key, value, tail, edit.slice_rows(first, rows), scale, sinks))
    return torch.cat(out, 2)


def _plain(query: Tensor, key: Tensor, value: Tensor, see: Visibility, rows: int, scale: float) -> Tensor:
    """The leading query rows, which no part of the edit touches, on stock attention."""
    leading = query.shape[2]
    repeat = query.shape[1] // key.shape[1]
    if see.plain and see.offset is not None:  # causal: these rows do not see past themselves
        key, value = key[:, :, : see.offset + leading], value[:, :, : see.offset + leading]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if see.mask is None:
        return F.scaled_dot_product_attention(
            query, key[:, :, :leading], value[:, :, :leading], is_causal=True, scale=scale
        )
    mask = see.mask[..., :leading, : key.shape[2]]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if mask.dtype == torch.bool:
        return out
    sees = (mask > torch.finfo(mask.dtype).min / 2).any(-1, keepdim=True)
    return out.masked_fill(~sees, 0.0)  # with a finite mask a row that sees nothing would average everything
