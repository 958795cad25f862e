"""What rows are worth to the rows of an answer: attention of a few query rows, never rows x rows."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Look:
    """What a score may look at.

    Attributes:
        hidden: ``[batch, rows, hidden]``, the residual stream that enters the layer.
        answer: bool ``[batch, rows]``, rows whose gaze counts. ``real``: False for padding.
        inputs: what else the layer gets, by keyword.
    """

    hidden: Tensor
    answer: Tensor
    real: Tensor
    inputs: Mapping[str, Any]


Score = Callable[[nn.Module, Look], Tensor]
"""``score(layer, look)``: what each row is worth, ``[batch, rows]``; image tokens with the highest scores stay."""


def gaze(query: Tensor, key: Tensor, real: Tensor, scaling: float) -> Tensor:
    """Attention of some query rows on all real keys, mean over heads: float32 ``[batch, query, key]``.

    Args:
        query: ``[batch, heads, query, dim]``. key: ``[batch, kv_heads, key, dim]``. real: bool ``[batch, key]``.
    """
    batch, heads, rows, dim = query.shape
    grouped = query.float().reshape(batch, key.shape[1], -1, dim)  # heads that share a key lie side by side
    logits = grouped @ key.float().transpose(2, 3) * scaling
    share = logits.masked_fill(~real[:, None, None], float("-inf")).softmax(-1)
    return share.view(batch, heads, rows, -1).mean(1)


def rotated(attn: nn.Module, states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys ``[batch, heads, rows, dim]``, rotated as the file of their attention module does it."""
    rotate = getattr(sys.modules[type(attn).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        return states
    if next(iter(inspect.signature(rotate).parameters)) == "q":
        return rotate(states, states, *tables)[0]  # type: ignore[no-any-return]
    return rotate(states, *tables)  # type: ignore[no-any-return]


def answer_attention(layer: nn.Module, look: Look) -> Tensor:
    """Attention that the answer's rows A pay to every row in a pre-norm layer: ``[batch, rows]``.

        s_j = mean_{i in A} mean_h softmax_j(q_hi k_hj / sqrt(d))

    From its query and key projections, for the rows A only. Rotated where the layer gets ``position_embeddings``
    and the file of its attention module has ``apply_rotary_pos_emb``; else by content. Padding gets none.

    Raises:
        UnsupportedError: no ``input_layernorm``, or no ``self_attn`` with ``q_proj``, ``k_proj`` and known heads.
    """
    attn: Any = getattr(layer, "self_attn", None)
    if not hasattr(layer, "input_layernorm") or not all(hasattr(attn, name) for name in ("q_proj", "k_proj")):
        raise UnsupportedError(
            "the layer has no input_layernorm, self_attn.q_proj and self_attn.k_proj; give score=..."
        )
    rows = look.answer.any(0).nonzero().flatten()
    normed = layer.input_layernorm(look.hidden)  # type: ignore[operator]
    query = _heads(attn, attn.q_proj(normed[:, rows]), "q_norm")
    key = _heads(attn, attn.k_proj(normed), "k_norm")
    if (tables := look.inputs.get("position_embeddings")) is not None:
        cos, sin = tables
        query, key = rotated(attn, query, (cos[:, rows], sin[:, rows])), rotated(attn, key, (cos, sin))
    scaling = getattr(attn, "scaling", None)
    share = gaze(query, key, look.real, query.shape[-1] ** -0.5 if scaling is None else scaling)
    asked = look.answer[:, rows, None]
    total: Tensor = (share * asked).sum(1) / asked.sum(1).clamp_min(1)
    return total


def _heads(attn: Any, states: Tensor, norm: str) -> Tensor:
    """Projected rows ``[batch, rows, heads dim]`` as ``[batch, heads, rows, dim]``, with the norm of heads if any."""
    heads = getattr(attn, "num_heads", None)
    dim = getattr(attn, "head_dim", None) or (heads and attn.q_proj.out_features // heads)
    if dim is None:
        raise UnsupportedError("the layer's self_attn tells neither head_dim nor num_heads; give score=...")
    states = states.view(*states.shape[:-1], -1, dim)
    if (module := getattr(attn, norm, None)) is not None:
        states = module(states)
    return states.transpose(1, 2)


def no_grad(score: Score, layer: nn.Module, look: Look) -> Tensor:
    """A score, float32, that no gradient goes through."""
    with torch.no_grad():
        return score(layer, look).float()
