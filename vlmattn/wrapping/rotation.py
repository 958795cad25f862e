"""Row groups with rotary bases of their own; only models whose recipe asks for it get the hook."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.wrapping.call import CALL, Call
from vlmattn.wrapping.record import Record


def hook_rotation(record: Record, model: PreTrainedModel, call: Call) -> None:
    """Put a hook on the model's rotary embedding, if the branches of a call ask for other bases."""
    if all(branch.rope == 1 for branch in call.branches.contrast.branches):
        return
    with record.lock:
        if not record.rotating:
            record.hooks.append(record.family.rotary(model).register_forward_hook(_rotate_apart, with_kwargs=True))
        record.rotating = True


def _rotate_apart(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...] | None:
    call = CALL.get()
    if call is None or call.record.family.rotary(call.model) is not module:
        return None
    ropes = (call.rope,) if call.branches is None else call.branches.ropes
    if all(rope == 1 for rope in ropes):
        return None
    hidden, positions = (*args, *kwargs.values())[:2]
    groups = zip(ropes, positions.chunk(len(ropes), -2), *(table.chunk(len(ropes), -3) for table in out), strict=True)
    tables = [
        found if rope == 1 else call.record.rotary(module, rope).forward(hidden, part) for rope, part, *found in groups
    ]
    return tuple(torch.cat(parts, -3) for parts in zip(*tables, strict=True))
