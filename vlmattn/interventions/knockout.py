"""Attention knockout: hide keys of one kind from rows of another (arXiv 2304.14767, 2411.18620)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.interventions.base import Intervention
from vlmattn.interventions.registry import option, register
from vlmattn.kernels import AttentionEdit, MaskPart
from vlmattn.request import Scope


@register(
    "knockout",
    paper="arXiv:2304.14767, arXiv:2411.18620",
    code="own",
    faithful="paper text",
    parts="mask",
    cost="prefill: dense rows; decode: one comparison per key",
    presets={
        "knockout_image_text": (
            "text rows and generated tokens do not see images",
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

    Sources: image tokens, or text of the prompt (answers of earlier turns included). Targets: text rows (generated ones too), image rows, the last prompt
    row, or the rows of generated tokens. A row always sees itself. Counts rows that lose keys.
    """

    source: str = option("image", about="keys that are hidden", choices=("image", "text"))
    target: str = option("text", about="rows that lose them", choices=("text", "image", "last", "generated"))

    def hides(self) -> frozenset[str]:
        rows = "image" if self.target == "image" else "text"
        if rows == self.source == "image":
            return frozenset({"image-same image", "image-other image"})
        return frozenset({f"{rows}-{self.source}"})

    def edit(self, scope: Scope) -> AttentionEdit:
        slots = torch.arange(scope.keys, device=scope.device).expand_as(scope.visual)
        in_prompt = slots < scope.request.prompt_length
        hidden = scope.visual if self.source == "image" else ~scope.visual & in_prompt
        # Different slots: a row keeps itself. While decoding the row's slot is not known, and never among the hidden.
        rows = torch.where(self._rows(scope, in_prompt), scope.of_rows(slots, scope.keys), -1)
        scope.count("knockout", (rows >= 0).sum())
        return AttentionEdit(mask=(MaskPart(rows, torch.where(hidden, slots, -1), 0.0, "different"),))

    def _rows(self, scope: Scope, in_prompt: Tensor) -> Tensor:
        """bool ``[batch, query]``: rows of the target."""
        if self.target == "last":
            slots = torch.arange(scope.keys, device=scope.device)
            return scope.of_rows(slots == scope.request.last_prompt_row(scope.device)[:, None], False)
        if self.target == "generated":
            return scope.of_rows(~in_prompt, True)
        return scope.of_rows(scope.visual == (self.target == "image"), self.target == "text")
