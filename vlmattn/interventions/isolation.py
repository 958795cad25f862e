"""Isolation: images or documents that do not see each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.interventions.base import Intervention
from vlmattn.interventions.documents import documents
from vlmattn.kernels import AttentionEdit, MaskPart
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "isolation",
    paper="arXiv:2503.13792 (baseline of SoFA)",
    code="own",
    faithful="paper text",
    parts="mask",
    cost="prefill: dense rows; decode: nothing",
    presets={
        "isolate_images": ("images do not see each other: the isolated baseline of SoFA", {"between": "images"}),
        "isolate_documents": ("images with the text around them do not see each other", {"between": "documents"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class Isolation(Intervention):
    """Hide the edges between images, or between documents. The question, and what is generated, sees everything.

    between "images": image tokens do not see tokens of other images; text rows stay as they are. between "documents":
    rows of one document do not see another. Documents are the stretches that ``separator`` tokens end, or without any
    the images, each with the text that follows it; what comes after the last one is the question. Counts rows kept
    apart.

    Raises:
        OptionError: separators that are no token ids.
    """

    between: str = option("images", about="what is kept apart", choices=("images", "documents"))
    separator: tuple[int, ...] = option((), about="token ids that end a document; empty: every image begins one")

    def hides(self) -> frozenset[str]:
        return frozenset({"image-other image"} | ({"between documents"} if self.between == "documents" else set()))

    def edit(self, context: LayerContext) -> AttentionEdit:
        if not context.step.is_prompt:
            return AttentionEdit()
        ids: Tensor = context.memo(("isolation", self.between, self.separator), lambda: self._ids(context))
        rows = context.of_rows(ids, -1)
        context.count("isolation", (rows > 0).sum())
        return AttentionEdit(mask=(MaskPart(rows, ids, 0.0, "different"),))

    def _ids(self, context: LayerContext) -> Tensor:
        return context.images if self.between == "images" else documents(context, self.separator).to(torch.int16)
