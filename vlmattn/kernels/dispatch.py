"""Which backend runs an edit. ``VLMATTN_BACKEND`` forces one, and a forced backend never falls back."""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.kernels import eager, merge, reference
from vlmattn.kernels.edit import scale_heads
from vlmattn.kernels.problem import Problem
from vlmattn.kernels.visibility import visible

BACKENDS = ("reference", "eager", "merge", "triton")
_CHUNK = 2**24  # scores held at once by the dense backend in prefill: 64 MB
_FEW = 16  # query rows for which the decode kernel is chosen: one token, or a draft of assisted decoding
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def attend(problem: Problem, backend: str | None = None) -> tuple[Tensor, str]:
    """Edited attention and the name of the backend that ran.

    Args:
        backend: one of ``BACKENDS``; None takes ``VLMATTN_BACKEND`` or, without it, the fastest that can run the edit:
            ``triton`` for up to 16 query rows on a GPU in half precision, otherwise dense for one query row, flash
            segments (``merge``) for several, dense in chunks of rows for the rest.

    Returns:
        output ``[batch, heads, query, dim]`` in the dtype of the queries, and the backend's name.

    Raises:
        OptionError: no such backend.
        UnsupportedError: a forced backend cannot run this call.
    """
    name = backend or os.environ.get("VLMATTN_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise OptionError(f"VLMATTN_BACKEND must be one of {', '.join(BACKENDS)}; got '{name}'")
    if name == "reference":
        return reference.attention(problem).to(problem.query), name
    problem = problem.shifted()
    if name is None:
        name = _fastest(problem)
    elif reason := _cannot_run(name, problem):
        raise UnsupportedError(f"backend '{name}' was forced but cannot run this call: {reason}; unset VLMATTN_BACKEND")
    if name == "triton":
        from vlmattn.kernels import triton_decode

        return triton_decode.attention(problem), name
    out = _merge(problem) if name == "merge" else _eager(problem)
    return scale_heads(problem.edit, out), name


def _fastest(problem: Problem) -> str:
    query = problem.query
    training = _is_training(problem)
    # on a CPU Triton is an interpreter, and only runs when forced
    few = query.device.type == "cuda" and problem.rows <= _FEW and query.dtype != torch.float32
    if few and not training and _cannot_run("triton", problem) is None:
        return "triton"
    return "eager" if training or problem.rows == 1 or merge.supports(problem) else "merge"


def _cannot_run(name: str, problem: Problem) -> str | None:
    """Why a backend cannot run a call, if it cannot."""
    if name == "merge":
        return merge.supports(problem)
    if name == "eager":
        return None
    if _is_training(problem):
        return "it has no gradient"
    if not _HAS_TRITON:
        return "triton is not installed; pip install triton"
    from vlmattn.kernels import triton_decode

    return triton_decode.supports(problem)


def _is_training(problem: Problem) -> bool:
    """Whether gradients are asked for, which log-sum-exp has none of."""
    return problem.dropout > 0 or (torch.is_grad_enabled() and problem.query.requires_grad)


def _eager(problem: Problem) -> Tensor:
    rows, edit = problem.rows, problem.edit
    stock = not problem.dropout and problem.softcap is None and problem.sinks is None  # what SDPA can do
    if rows == 1:
        return eager.reading(problem) if stock and edit.only_read else eager.attention(problem, 0, 1)
    first = min(edit.first_row, rows) if stock else 0
    out = [_plain(problem, first)] if first else []
    step = max(16, _CHUNK // (problem.query.shape[0] * problem.query.shape[1] * problem.key.shape[2]))
    out += [eager.attention(problem, start, min(start + step, rows)) for start in range(first, rows, step)]
    return torch.cat(out, 2)


def _merge(problem: Problem) -> Tensor:
    rows = problem.rows
    first = min(problem.edit.first_row, rows) if problem.sinks is None else 0
    out = [_plain(problem, first)] if first else []
    if first < rows:
        out.append(merge.attention(problem, first))
    return torch.cat(out, 2)


def _plain(problem: Problem, leading: int) -> Tensor:
    """The first ``leading`` query rows, which no part of the edit touches, on stock attention."""
    query, key, value, see = problem.query[:, :, :leading], problem.key, problem.value, problem.visibility
    repeat = query.shape[1] // key.shape[1]
    if see.plain and see.offset is not None:  # causal: these rows do not see past themselves
        key, value = key[:, :, : see.offset + leading], value[:, :, : see.offset + leading]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if see.mask is None:
        key, value = key[:, :, :leading], value[:, :, :leading]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=problem.scale)
    mask = see.mask[..., :leading, : key.shape[2]]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=problem.scale)
    if mask.dtype == torch.bool:
        return out
    sees = visible(mask).any(-1, keepdim=True)
    return out.masked_fill(~sees, 0.0)  # with a finite mask a row that sees nothing would average everything
