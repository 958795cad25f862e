"""Who watches a prompt and its answer at work, layer by layer and row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from vlmattn.errors import UnsupportedError
from vlmattn.interventions.sinks import sink_values
from vlmattn.kernels import AttentionEdit, scale_heads
from vlmattn.request import LayerContext, Request, Step, Weights

Keep = Callable[[int, int, Tensor, Tensor], None]
"""``keep(row, layer, attention, gain)``: attention float32 ``[heads, key]`` and head gains ``[heads]`` of one row, on
the CPU. Keys are the original slots that were there when the row was read."""


class Recorder:
    """Sees the rows that predict the answer, and chosen rows of the prompt, in every layer (a ``Watcher``).

    Rows and keys count in original slots, whatever tokens a layer goes on with. One sequence, no padding.

    Attributes:
        phi, dims, norms, likeness: (layer) -> one tensor for each forward: sink value over all dimensions, its
            dimension, norm, and abs(cos) with the first token (nan if that is gone) of each token that entered, with
            the tokens' slots in ``slots``.
    """

    def __init__(self, rows: Collection[int], layers: Collection[int], keep: Keep) -> None:
        self._rows, self._layers, self._keep = rows, layers, keep
        self.slots: dict[int, list[Tensor]] = {}
        self.phi: dict[int, list[Tensor]] = {}
        self.dims: dict[int, list[Tensor]] = {}
        self.norms: dict[int, list[Tensor]] = {}
        self.likeness: dict[int, list[Tensor]] = {}
        self._first: dict[int, Tensor] = {}
        self._entered: Counter[int] = Counter()  # generated tokens by layer
        self._attended: Counter[int] = Counter()

    def enter(self, step: Step, layer: int, hidden: Tensor) -> None:
        """Note norm and sink value of the tokens that enter a layer."""
        if len(hidden) != 1:
            raise UnsupportedError("only one sequence can be looked at; use no beams and no method that searches")
        if step.start is None or not step.is_prompt:
            slots = torch.tensor([_prompt_length(step.request) + self._entered[layer]])
            self._entered[layer] += 1
        elif step.request.tokens is None:
            slots = torch.arange(step.start, step.start + hidden.shape[1])
        else:
            slots = step.request.tokens.slots[0, -hidden.shape[1] :].cpu()
        rows = hidden[0].float()
        if int(slots[0]) == 0:
            self._first[layer] = rows[0].clone()  # a view would keep the whole prompt
        first = self._first.get(layer, rows.new_full((rows.shape[-1],), float("nan")))
        self.slots.setdefault(layer, []).append(slots)
        self.phi.setdefault(layer, []).append(sink_values(rows, ()).cpu())
        self.dims.setdefault(layer, []).append(rows.abs().argmax(-1).cpu())
        self.norms.setdefault(layer, []).append(rows.norm(dim=-1).cpu())
        self.likeness.setdefault(layer, []).append(torch.cosine_similarity(rows, first, dim=-1).abs().cpu())

    def attended(self, context: LayerContext, edit: AttentionEdit, weights: Weights) -> None:
        """Keep what the wanted rows of a layer attend to."""
        if context.layer not in self._layers:  # cross-attention, whose keys are no tokens
            return
        keys = _original(context)
        if context.step.start is None or not context.step.is_prompt:
            row = _prompt_length(context.request) + self._attended[context.layer]
            self._attended[context.layer] += 1
            rows = [(0, row)]
        else:
            own = keys[context.keys - context.queries :].tolist()
            rows = [(place, row) for place, row in enumerate(own) if row in self._rows]
        for place, row in rows:
            found = weights(place, place + 1)[0, :, 0].float().cpu()
            attention = found.new_zeros(len(found), int(keys[-1]) + 1)  # image tokens of some models see ahead
            attention[:, keys] = found
            gains = head_gains(edit.slice_rows(place, place + 1), len(found), 1, context.device)
            self._keep(row, context.layer, attention, gains[:, 0].cpu())


def _prompt_length(request: Request) -> int:
    """Original slots of the prompt."""
    tokens = request.tokens
    return request.prompt_length if tokens is None else request.prompt_length + tokens.removed


def _original(context: LayerContext) -> Tensor:
    """The original slot of each key of a layer, on the CPU."""
    slots, tokens = torch.arange(context.keys), context.request.tokens
    if tokens is None:
        return slots
    kept = tokens.slots[0].cpu()
    return torch.cat([kept[: context.keys], slots[len(kept) :] + tokens.removed])


def head_gains(edit: AttentionEdit, heads: int, rows: int, device: torch.device) -> Tensor:
    """What head outputs of an edit's rows are multiplied with, float32 ``[heads, row]``."""
    parts = tuple(replace(part, offset=None) for part in edit.head_gain)
    return scale_heads(AttentionEdit(head_gain=parts), torch.ones(1, heads, rows, 1, device=device))[0, :, :, 0]
