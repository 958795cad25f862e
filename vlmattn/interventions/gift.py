"""GIFT: gaze shift-guided intervention (arXiv 2510.22067)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.interventions.base import Intervention
from vlmattn.kernels import AttentionEdit, BoostPlan, GainPart
from vlmattn.options import option, parse_layers
from vlmattn.registry import register
from vlmattn.request import TEXT, USER, LayerContext, Prefill, Request, Weights

_ROWS = 64  # question rows looked at together


@register(
    "gift",
    paper="arXiv:2510.22067 (ICML 2026)",
    code="github.com/amazon-science/GIFT (not used: non-commercial)",
    faithful="paper text; experimental (content words by a list, not by a tagger)",
    parts="groups + gain with key weights",
    cost="prefill: attention of the question's rows in one layer (one more decoder pass if earlier layers are edited);"
    " decode: group masses of one row, a sort over heads",
    presets={
        "gift": ("constants for LLaVA-1.5-7B", {}),
        "gift_13b": ("constants for LLaVA-1.5-13B", {"saliency": "10/40", "layers": "14/40:21/40"}),
        "gift_qwen2_vl": ("constants for Qwen2-VL-7B", {"saliency": "14/28", "layers": "5/28:19/28", "alpha": 4.0}),
    },
)
@dataclass(frozen=True, kw_only=True)
class GIFT(Intervention):
    """Boost the image tokens that the model's gaze moves to while it reads the question.

    In layer ``saliency``, for the rows i of content words of the question and image keys j, with A the unedited
    attention:

        D_hij = max(A_hij - A_h(i-1)j, 0);  S_j = mean over i and the floor(H/2) heads of largest sum of D
        w_j = exp(alpha S_j),  S clamped to its mean +- 3 std and scaled to 0..1 over the image tokens

    Then, in ``layers`` and in the row that predicts the next token, with H_V and H_Q the floor(H/2) heads of largest
    mass on the image and on the question:

        a_j <- w_j a_j for image keys in H_V;   r = sum_{H_V} sum_j w_j a_j / sum_{H_V} sum_j a_j
        a_j <- r a_j for question keys in H_Q;  rows are renormalised

    The question is the text of the last user's turn in rows that follow an image. The paper finds content words by a
    tagger; here they are the words that are not in a list of English function words (experimental), and all words if
    the question has no others. Counts samples with a question.

    Raises:
        OptionError: the turns cannot be known, as there is no processor; ``saliency`` is not one layer.
        InputError: a prompt without a user's turn.
        UnsupportedError: a later turn on the same cache, if ``saliency`` is not before all edited layers.
    """

    turns = "needed"
    alpha: float = option(5.0, 0, 20, "strength: weights are 1..e^alpha", source="paper: 5 for LLaVA, 4 for Qwen2-VL")
    saliency: str = option("11/32", about="the layer whose gaze is followed", source="paper: 11 of 32")
    layers: str = option("12/32:23/32", about="decoder layers that are edited", source="paper: 12..22 of 32")

    def bind(self, anatomy: Anatomy) -> GIFT:
        found = parse_layers(self.saliency, anatomy.layers, "gift.saliency")
        if len(found) != 1:
            raise OptionError(f"gift.saliency must name one layer, got '{self.saliency}'")
        return replace(self, saliency=str(found[0]), layers=",".join(map(str, self.active_layers(anatomy))))

    @property
    def _looks_ahead(self) -> bool:
        """Whether layers are edited before the saliency is known, so that it takes a pass of its own (once bound)."""
        return int(self.layers.split(",")[0]) <= int(self.saliency)

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return () if self._looks_ahead else (int(self.saliency),)

    def before_prefill(self, prefill: Prefill) -> None:
        if not self._looks_ahead:
            return

        def watch(layer: int, out: Tensor, weights: Weights) -> None:
            if layer == int(self.saliency):
                self._follow(prefill.request, 0, out.shape[1], out.device, weights)

        prefill.run(prefill.embeds, prefill.positions, watch)

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        start = context.step.start or 0
        self._follow(context.request, start, start + context.queries, context.device, weights)

    def _follow(self, request: Request, start: int, stop: int, device: torch.device, weights: Weights) -> None:
        """Find the key weights from the rows of the question among the slots ``start:stop``."""
        image, real = request.types(stop, device) != TEXT, request.real(stop, device)
        visual = image if real is None else image & real
        turns = request.turns(stop, device)
        question = ~image & (request.roles(stop, device) == USER) & (turns == turns.amax(1, keepdim=True))
        question = question & (visual.cumsum(1) > 0)
        telling = question & request.content(stop, device)
        telling = torch.where(telling.any(1, keepdim=True), telling, question)
        places = telling[:, start:].any(0).nonzero().flatten()
        if not len(places):
            return
        first, last = int(places[0]), int(places[-1]) + 1
        per_head = torch.zeros(())  # summed over rows: [batch, heads, keys]
        for a in range(first, last, _ROWS):
            b = min(a + _ROWS, last)
            shift = self._shift(weights(max(a - 1, 0), b)[..., :stop], a == 0)
            per_head = per_head.to(device) + (shift * telling[:, None, start + a : start + b, None]).sum(2)
        per_head = per_head * visual[:, None]
        top = max(1, per_head.shape[1] // 2)
        heads = per_head.sum(-1).topk(top, dim=1).indices
        saliency = per_head.gather(1, heads[..., None].expand(-1, -1, stop)).mean(1)  # its scale does not matter
        asked = question.any(1)
        weight = torch.where(asked[:, None] & visual, torch.exp(self.alpha * _scaled(saliency, visual)), 1.0)
        groups = torch.where(visual, 1, torch.where(question, 2, 0)).to(torch.uint8)
        kept = request.store(self)  # keys that come later weigh 1 and belong to the rest
        request.write(kept.by_slot("weight", 1.0, torch.float32), weight)
        request.write(kept.by_slot("groups", 0, torch.uint8), groups)
        request.ledger.add(("fired", "gift"), asked.sum())

    def _shift(self, attended: Tensor, from_start: bool) -> Tensor:
        """Positive change of attention from each row to the next, ``[batch, heads, rows - 1, keys]``."""
        if from_start:  # the first row of the prompt has none before it
            attended = torch.cat([attended[:, :, :1], attended], 2)
        return attended.diff(dim=2).clamp_min(0)

    def edit(self, context: LayerContext) -> AttentionEdit:
        if context.step.is_prompt and context.step.start and self._looks_ahead:
            raise UnsupportedError(
                f"gift follows the gaze in layer {self.saliency} before it edits layer {self.layers.split(',')[0]}, so"
                " it must see the whole prompt at once; give the whole conversation without a cache, or edit later"
                " layers only"
            )
        kept = context.request.store(self).slots
        if not kept or not self.alpha:
            return AttentionEdit()

        def read() -> list[Tensor]:
            return [context.request.read(kept[name], context.keys, context.device) for name in ("weight", "groups")]

        weight, groups = context.memo(("gift", self), read)
        return AttentionEdit(gain=(GainPart(groups, BoostPlan(), context.rows_that_predict(), weight=weight),))


def _scaled(saliency: Tensor, visual: Tensor) -> Tensor:
    """Saliency ``[batch, keys]`` clamped to mean +- 3 std over the image tokens (unbiased) and scaled to 0..1 there."""
    count = visual.sum(1, keepdim=True)
    mean = (saliency * visual).sum(1, keepdim=True) / count.clamp_min(1)
    std = (((saliency - mean) * visual).square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    clamped = torch.minimum(torch.maximum(saliency, mean - 3 * std), mean + 3 * std)
    low = clamped.masked_fill(~visual, float("inf")).amin(1, keepdim=True)
    high = clamped.masked_fill(~visual, float("-inf")).amax(1, keepdim=True)
    return torch.where(visual, (clamped - low) / (high - low).clamp_min(1e-12), 0.0)
