"""Prompts that generate() reads in pieces (``prefill_chunk_size``): what is known of the whole at the first one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.errors import InputError, UnsupportedError
from vlmattn.request import Plan, Request
from vlmattn.wrapping.record import Record


@dataclass(eq=False)
class Ahead:
    """A prompt from slot ``start`` on: types, numbers of images and ids of its tokens, ``[batch, new]``.

    ``entered``: slots that have been read.
    """

    start: int
    types: Tensor
    images: Tensor
    ids: Tensor
    entered: int = 0

    def read(self, request: Request, stop: int, real: Tensor | None, prompt_length: int | None, rows: int) -> None:
        """Let a request of so many rows know the whole prompt, of which the tokens before slot ``stop`` have come."""
        self.entered, times = stop, rows // len(self.ids)
        types, images, ids = (part.repeat_interleave(times, 0) for part in (self.types, self.images, self.ids))
        request.extend(self.start, types, images, real, prompt_length, ids)


def read_ahead(record: Record, model: PreTrainedModel, plan: Plan, kwargs: Mapping[str, Any]) -> Ahead | None:
    """What a generate() call says of a prompt that comes in pieces; None for one that does not.

    Raises:
        UnsupportedError: a method that needs the whole prompt at once.
        InputError: no token ids; a piece that is padding alone.
    """
    size = compat.setting_of(model, kwargs, "prefill_chunk_size")
    if not size:
        return None
    if needing := _needing(plan):
        raise UnsupportedError(
            f"{', '.join(needing)} must see the whole prompt in one piece; set prefill_chunk_size=None, or take a"
            " method whose rows depend on the tokens before them alone (pai, var, isolate_images, heads_*, ...)"
        )
    cache, ids = compat.cache_of(kwargs), kwargs.get("inputs", kwargs.get("input_ids"))
    if not isinstance(ids, Tensor) or ids.ndim != 2 or record.anatomy.leading:
        raise InputError("edits of a prompt in pieces need input_ids; set prefill_chunk_size=None")
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, : int(size)].any(1).all()):
        raise InputError(
            f"padding fills the first {size} tokens of a row; take a larger prefill_chunk_size, or prompts of like"
            " lengths"
        )
    start = int(cache.get_seq_length()) if cache is not None else 0
    ids = ids[:, start:]
    types = record.family.token_types(model, ids)
    images = record.family.image_numbers(model, {**kwargs, "input_ids": ids}, types, record.marker_ids)
    return Ahead(start, types, images, ids)


def _needing(plan: Plan) -> list[str]:
    """Who needs all of a prompt at once: to look at it, to choose among its tokens, to let tokens see later ones."""
    methods: list[Any] = [method for layer in plan.by_layer for method in layer if method.opens()]  # type: ignore[attr-defined]
    for found in (plan.on_attention, plan.on_queries_keys):
        methods += [method for layer in found for method in layer]
    methods += [*plan.before_prefill, *plan.on_image_features, *plan.pruning, *plan.policies]
    names = [method.info.name for method in methods if hasattr(method, "info")]
    return list(dict.fromkeys(([plan.rule] if plan.rule else []) + names))
