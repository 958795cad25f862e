"""What heads say at the last row of prompts, with the image and without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.anatomy import Anatomy
from vlmattn.errors import UnsupportedError
from vlmattn.inspection.measuring import Measure, only
from vlmattn.interventions import VHR
from vlmattn.kernels import AttentionEdit
from vlmattn.options import option
from vlmattn.request import LayerContext


def head_outputs(
    model: PreTrainedModel, anatomy: Anatomy, batches: Sequence[dict[str, Any]], *beside: Measure
) -> tuple[Tensor, Tensor]:
    """Over all prompts, at the last row of each: how far the image moves a head, and what the head says.

        vhd = mean of ||A - B||,   A a head's output, B without the image tokens;   means = mean of A

    Args:
        batches: prepared inputs with images.
        beside: what else measures in the same forwards.

    Returns:
        ``[layers, heads]`` and ``[layers, heads, dim]``, on the cpu.

    Raises:
        UnsupportedError: a model with layers without attention.
    """
    outputs = _Outputs()
    with only(model, outputs, *beside):
        if anatomy.attending is not None:
            raise UnsupportedError(
                f"{type(model).__name__} has layers without attention, and the pass that measures what heads say with"
                " the image and without it needs attention in every layer; retrieve_images works on such models"
            )
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)

    def mean(calls: dict[int, Tensor]) -> Tensor:  # the layers of one forward after those of another
        found = list(calls.values())
        return torch.stack([torch.cat(found[layer :: anatomy.layers]).mean(0) for layer in range(anatomy.layers)])

    return mean(outputs.distances), mean(outputs.seen)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Outputs(VHR):
    """VHR's pass with and without the image, in which no head is reinforced: number of the call -> what it saw."""

    layers: str = option("0:")
    distances: dict[int, Tensor] = field(default_factory=dict, repr=False)
    seen: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def edit(self, context: LayerContext) -> AttentionEdit:
        return AttentionEdit()

    def gains(self, seeing: Tensor, blind: Tensor) -> Tensor:
        call = len(self.seen)
        self.seen[call], self.distances[call] = seeing.cpu(), (seeing - blind).norm(dim=-1).cpu()
        return torch.ones_like(seeing[..., 0])
