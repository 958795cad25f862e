"""Bidirectional images and prompts: the masks of PaliGemma, Gemma 3, Croc and MoCa, without training."""

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
    "bidirectional",
    paper="arXiv:2407.07726 (PaliGemma), arXiv:2503.19786 (Gemma 3), arXiv:2506.23115 (MoCa)",
    code="mask functions of transformers",
    faithful="experimental",
    parts="mask",
    cost="prefill: dense rows; decode: nothing",
    presets={
        "bidirectional_image": ("tokens of one image see each other (Gemma 3)", {"span": "image"}),
        "bidirectional_images": ("tokens of all images see each other: the full baseline of SoFA", {"span": "images"}),
        "bidirectional_prompt": ("the whole prompt sees itself (PaliGemma, MoCa)", {"span": "prompt"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class Bidirectional(Intervention):
    """Open the edges to later keys within a span; a key there counts ``sigma`` times (1 = fully).

        span "image":   image row i sees key j > i of the same image
        span "images":  ... of any image
        span "prompt":  every prompt row sees the whole prompt

    The papers train with these masks; a model trained causally has never seen such attention, so all presets are
    experimental: begin with few layers or a small sigma. Only the prompt is edited. Counts rows that see more.

    Raises:
        OptionError: sigma outside 0..1.
    """

    span: str = option("image", about="what sees itself", choices=("image", "images", "prompt"))
    sigma: float = option(1.0, 0, 1, "how much a later key counts", source="papers: 1")
    layers: str = option("0:-1", about="decoder layers", source="all; the last would have no effect")

    def opens(self) -> frozenset[str]:
        edges = {"image-same image"}
        if self.span != "image":
            edges |= {"image-other image"}
        if self.span == "prompt":
            edges |= {"image-text", "text-image", "text-text", "between documents"}
        return frozenset(edges)

    def edit(self, context: LayerContext) -> AttentionEdit:
        if not self.sigma or not context.step.is_prompt:
            return AttentionEdit()
        ids: Tensor = context.memo(("bidirectional", self.span), lambda: self._ids(context))
        rows = context.of_rows(ids, -1)
        context.count("bidirectional", (rows >= 0).sum())
        return AttentionEdit(mask=(MaskPart(rows, ids, self.sigma, "same"),))

    def _ids(self, context: LayerContext) -> Tensor:
        """Tokens with the same id see each other."""
        if self.span == "image":
            return context.images
        slots = torch.arange(context.keys, device=context.device)
        inside = (
            context.visual
            if self.span == "images"
            else (slots < context.request.prompt_length).expand_as(context.visual)
        )
        return torch.where(inside, 0, -1)
