"""Attention calibration for fair embeddings of long documents (arXiv 2601.16934)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.errors import InputError
from vlmattn.interventions.base import Intervention
from vlmattn.interventions.documents import documents
from vlmattn.kernels import AttentionEdit, GainPart, LevelPlan, Rows
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext

_MOST = 255  # groups that fit a byte


@register(
    "calibration",
    paper="arXiv:2601.16934 (ACL 2026)",
    code="github.com/impresso/fair-sentence-transformers (read, not used)",
    faithful="released code (formula checked)",
    parts="groups + gain",
    cost="one row of the prefill in half of the layers",
    presets={"calibration": ("strength .5, baskets of 128 tokens, last half of the layers; for embeddings", {})},
)
@dataclass(frozen=True, kw_only=True)
class Calibration(Intervention):
    """Even out the attention of the pooling token over the parts of a document.

    Keys fall into segments g; with M_g the pooling row's mass on each and n segments that have any:

        gamma_g = 1 - strength + strength (1 / n) sum_g' M_g' / M_g

    The pooling token is the last prompt token; it is a segment of its own, as the released code does with CLS. Segments
    are baskets of ``basket`` tokens, or documents (see isolation) with the rest of the prompt as one more. For
    embeddings: generated rows are not edited. Prompts without images are welcome. Counts prompts.

    Raises:
        OptionError: an option out of range.
        InputError: more than 255 segments.
    """

    acts_on = "tokens"
    needs_images = False
    strength: float = option(0.5, 0, 1, "0: as it was, 1: equal masses", source="released library's example")
    segments: str = option("tokens", about="what is evened out", choices=("tokens", "documents"))
    basket: int = option(128, 1, 10**6, "tokens of a segment", source="released code")
    separator: tuple[int, ...] = option((), about="token ids that end a document; empty: every image begins one")
    layers: str = option("1/2:", about="decoder layers", source="released code: last half")

    def edit(self, context: LayerContext) -> AttentionEdit:
        if not self.strength or not context.step.is_prompt:
            return AttentionEdit()
        groups, count, rows = context.memo(("calibration", self), lambda: self._segments(context))
        return AttentionEdit(gain=(GainPart(groups, LevelPlan(count, self.strength), rows),))

    def _segments(self, context: LayerContext) -> tuple[Tensor, int, Rows]:
        """Segment of every key, how many there are, and the pooling rows."""
        slots = torch.arange(context.keys, device=context.device)
        pooling = slots == context.request.last_prompt_row(context.device)[:, None]
        if self.segments == "documents":
            number = documents(context, self.separator) + 2
        else:
            real = torch.ones_like(pooling) if context.real is None else context.real
            number = (real.cumsum(1) - 1).clamp_min(0) // int(self.basket) + 1
        number = number.masked_fill(pooling | (slots >= context.request.prompt_length), 0)
        count = int(number.max()) + 1  # one look per prompt
        if count > _MOST:
            remedy = (
                "give a larger basket" if self.segments == "tokens" else "use fewer separators, or segments='tokens'"
            )
            raise InputError(f"calibration: {count} segments, at most {_MOST}; {remedy}")
        context.count("calibration", len(number))
        rows = context.rows_that_predict()
        first = rows.first if rows is not None else 0
        return number.to(torch.uint8), count, Rows(context.of_rows(pooling, False), first)
