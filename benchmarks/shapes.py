"""Edits and tensors that several kernel benchmarks measure: VAR's groups, PAI's scores, a dominant sink."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmattn.kernels import AttentionEdit, BoostPlan, GainPart, GainPlan, LogitPart, MassGate, Rows

# Groups: text, text sink, image, image sink. The gate asks for mass on the image, as VAR's does.
VAR_PLAN = GainPlan(taken=(0, 0.6, 0, 0.6), given=(0, 0, 1, 0), gates=(MassGate((0, 0, 1, 1), 0.2),))
IMAGE = (35, 611)  # slots of LLaVA-1.5's 576 image tokens
_SINKS = (0, 100)  # one in the text, one in the image
_SINK_SCORE = 11.0  # over scores near 0: the two sinks take most of every row's mass


def tensors(
    rows: int, keys: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, batch: int = 1, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query ``[batch, heads, rows, dim]``, key and value ``[batch, kv_heads, keys, dim]`` with dominant
    sinks."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((batch, heads, rows, dim), *[(batch, kv_heads, keys, dim)] * 2)
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype, device=device) for shape in shapes)
    query[..., 0] = 4.0
    key[..., 0] = 0.0
    for slot in _SINKS:
        key[:, :, slot, 0] = _SINK_SCORE * dim**0.5 / 4.0
    return query, key, value


def groups(keys: int, batch: int = 1, device: str = "cpu") -> Tensor:
    """uint8 ``[batch, keys]``: text before and after the image, a sink in each."""
    found = torch.zeros(batch, keys, dtype=torch.uint8, device=device)
    found[:, slice(*IMAGE)] = 2
    found[:, list(_SINKS)] += 1
    return found


def random_groups(keys: int, batch: int = 1, device: str = "cpu") -> Tensor:
    """uint8 ``[batch, keys]``: any of four groups at every key."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(0, 4, (batch, keys), generator=generator, dtype=torch.uint8, device=device)


def var(members: Tensor, rows: Rows | None = None) -> AttentionEdit:
    """VAR's gain. With ``rows`` it also gets the hint where the image is, as a prompt has it."""
    runs = ((0, IMAGE[0], (0, 1)), (*IMAGE, (2, 3)), (IMAGE[1], members.shape[1], (0, 1)))
    return AttentionEdit(gain=(GainPart(members, VAR_PLAN, rows, None if rows is None else runs),))


def pai(members: Tensor) -> AttentionEdit:
    """PAI's logit part: scores of image tokens are lifted by half their size."""
    return AttentionEdit(logit=(LogitPart(lift=(members >= 2) * 0.5),))


def gift(members: Tensor) -> AttentionEdit:
    """GIFT's boost: a float weight per key beside the groups."""
    weight = 1 + torch.linspace(0, 1, members.shape[1], device=members.device).expand(len(members), -1)
    part = GainPart((members.long() // 2 + (members == 1)).clamp(max=2).to(torch.uint8), BoostPlan(0.5), weight=weight)
    return AttentionEdit(gain=(part,))


def after_image(rows: int, batch: int = 1) -> Rows:
    """The query rows of a prompt behind the image."""
    return Rows((torch.arange(rows) >= IMAGE[1]).expand(batch, rows), IMAGE[1])
