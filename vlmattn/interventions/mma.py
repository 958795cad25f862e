"""MMA: modality-mutual attention (AKI, arXiv 2503.02597)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmattn.interventions.base import Intervention
from vlmattn.kernels import AttentionEdit, MaskPart
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import MARKER, USER, LayerContext


@register(
    "mma",
    paper="arXiv:2503.02597 (ICML 2026)",
    code="github.com/sony/aki",
    faithful="golden (mask); experimental on models that were not trained with it",
    parts="mask",
    cost="prefill: dense rows; decode: nothing",
    presets={"mma": ("the mask of AKI on a model that was not trained with it", {})},
)
@dataclass(frozen=True, kw_only=True)
class MMA(Intervention):
    """Let image tokens see the instruction that comes after them.

    Image row i of user turn t also sees every text key j > i of turn t, up to and including the marker that hands over
    to the assistant; never an answer, never another turn. Images among themselves stay causal, and so does text. With
    several images each sees the text of its turn that follows it, text between the images included. An opened key
    counts ``sigma`` times. Only the prompt is edited. Counts image tokens in user turns.

    AKI is trained with this mask; on a model that is not, it is experimental.

    Raises:
        OptionError: the turns cannot be known, as there is no processor.
        InputError: a prompt without a user's turn.
    """

    turns = "needed"
    sigma: float = option(1.0, 0, 1, "how much an opened key counts", source="released code: 1")
    layers: str = option("0:-1", about="decoder layers", source="all; the last would have no effect")

    def opens(self) -> frozenset[str]:
        return frozenset({"image-text", "between documents"})

    def edit(self, context: LayerContext) -> AttentionEdit:
        if not self.sigma or not context.step.is_prompt:
            return AttentionEdit()
        instruction = ~context.visual & ((context.roles == USER) | (context.roles == MARKER))
        rows = context.of_rows(torch.where(context.visual, context.turns, -1), -1)
        context.count("mma", (rows >= 0).sum())
        return AttentionEdit(mask=(MaskPart(rows, torch.where(instruction, context.turns, -1), self.sigma, "same"),))
