"""Attention knockout: hide keys of one kind from rows of another (arXiv 2304.14767, 2411.18620)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.interventions.base import Intervention
from vlmattn.kernels import AttentionEdit, MaskPart
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "knockout",
    paper="arXiv:2304.14767, arXiv:2411.18620",
    code="own",
    faithful="paper text",
    parts="mask",
    cost="prefill: dense rows; decode: one comparison per key",
    presets={
        "knockout_image_text": (
            "text, generated tokens too, does not see images",
            {"source": "image", "target": "text"},
        ),
        "knockout_text_image": ("image rows do not see text", {"source": "text", "target": "image"}),
        "knockout_image_last": ("the last prompt row does not see images", {"source": "image", "target": "last"}),
        "knockout_image_generated": ("generated tokens do not see images", {"source": "image", "target": "generated"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class Knockout(Intervention):
    """Hide the keys of ``source`` from the rows of ``target``; the softmax is over what is left. A tool for analysis.

    Sources: image tokens, or text of the prompt (answers of earlier turns included). Targets: text rows (generated ones
    too), image rows, the last prompt row, or the rows of generated tokens. A row always sees itself. Counts rows that
    lose keys.
    """

    source: str = option("image", about="keys that are hidden", choices=("image", "text"))
    target: str = option("text", about="rows that lose them", choices=("text", "image", "last", "generated"))

    @property
    def acts_on(self) -> str:  # type: ignore[override]
        if self.target == "image":
            return "image rows"
        return "image keys" if self.source == "image" else "tokens"

    def hides(self) -> frozenset[str]:
        rows = "image" if self.target == "image" else "text"
        if rows == self.source == "image":
            return frozenset({"image-same image", "image-other image"})
        return frozenset({f"{rows}-{self.source}"})

    def edit(self, context: LayerContext) -> AttentionEdit:
        slots = torch.arange(context.keys, device=context.device).expand_as(context.visual)
        if context.crosses:
            tokens = context.tokens
            slots_of_rows = torch.arange(tokens.keys, device=tokens.device).expand_as(tokens.visual)
            rows = torch.where(self._rows(tokens, slots_of_rows < tokens.request.prompt_length), 0, -1)
            context.count("knockout", (rows >= 0).sum())
            return AttentionEdit(mask=(MaskPart(rows, torch.zeros_like(slots), 0.0),))
        in_prompt = slots < context.request.prompt_length
        hidden = context.visual if self.source == "image" else ~context.visual & in_prompt
        # Different slots: a row keeps itself. While decoding the row's slot is not known, and never among the hidden.
        rows = torch.where(self._rows(context, in_prompt), context.of_rows(slots, context.keys), -1)
        context.count("knockout", (rows >= 0).sum())
        return AttentionEdit(mask=(MaskPart(rows, torch.where(hidden, slots, -1), 0.0, "different"),))

    def _rows(self, context: LayerContext, in_prompt: Tensor) -> Tensor:
        """bool ``[batch, query]``: rows of the target."""
        if self.target == "last":
            slots = torch.arange(context.keys, device=context.device)
            return context.of_rows(slots == context.request.last_prompt_row(context.device)[:, None], False)
        if self.target == "generated":
            return context.of_rows(~in_prompt, True)
        return context.of_rows(context.visual == (self.target == "image"), self.target == "text")
