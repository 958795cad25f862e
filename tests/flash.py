"""Flash attention's two functions in plain torch, with its signatures, for transformers to call on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """States ``[batch, token, heads, dim]``; the last query row is the last key."""
    queries, keys = q.shape[1], k.shape[1]
    rows = torch.arange(queries)[:, None] + keys - queries
    far = rows - torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen &= far >= 0
    if window_size[0] >= 0:
        seen &= far <= window_size[0]
    k, v = (states.repeat_interleave(q.shape[2] // states.shape[2], 2) for states in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """States ``[all tokens, heads, dim]`` of sequences that end where ``cu_seqlens`` say."""
    out, options = [], dict(softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap)
    for row in range(len(cu_seqlens_q) - 1):
        own_q, own_k = (slice(int(ends[row]), int(ends[row + 1])) for ends in (cu_seqlens_q, cu_seqlens_k))
        out.append(flash_attn_func(q[None, own_q], k[None, own_k], v[None, own_k], **options)[0])
    return torch.cat(out)


class Calls:
    """Counts the calls of either function."""

    def __init__(self) -> None:
        self.count = 0

    def functions(self, *_: object) -> tuple[object, ...]:
        def counted(function):
            def call(*args: Tensor, **kwargs: object) -> Tensor:
                self.count += 1
                return function(*args, **kwargs)

            call.__signature__ = __import__("inspect").signature(function)
            return call

        pads = flash._pad_input, flash._unpad_input
        return counted(flash_attn_func), counted(flash_attn_varlen_func), None, *pads


@pytest.fixture
def flash_calls(monkeypatch) -> Calls:
    """transformers calls these functions as flash attention."""
    calls = Calls()
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: calls.functions())
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    return calls


def under_flash(model, name: str = "flash_attention_2"):
    """A model whose decoder has that attention, as ``from_pretrained(attn_implementation=...)`` leaves it."""
    model.config.get_text_config()._attn_implementation_internal = name
    return model
