"""Round attention: from a layer on read only the images that matter for the question (arXiv 2502.15294)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError
from vlmattn.interventions.pruning.budget import rows_seen
from vlmattn.interventions.pruning.policy import KVPolicy, host_counts, image_tokens, slots_of
from vlmattn.kernels import AttentionEdit
from vlmattn.options import option, parse_layers
from vlmattn.registry import register
from vlmattn.request import USER, Eviction, LayerContext, Weights


@register(
    "rounds",
    paper="arXiv:2502.15294",
    code="not available",
    faithful="experimental",
    parts="keep, or read",
    cost="decode: layers after the watershed hold, or read, the tokens of few images",
    presets={
        "rounds": (
            "upper layers keep the tenth of the images that the question looks at most, at least one",
            {},
        ),
        "rounds_read": ("the same, nothing is evicted: a later question chooses anew", {"memory": "read"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class Rounds(KVPolicy):
    """Choose images (or video frames given as images) in one layer, and let the layers above go on with those.

    With M_i the unedited attention of the question's rows on the tokens of image i in the ``watershed`` layer, summed,
    mean over heads: the round(``keep_share`` n) of n images with the highest M stay, at least one, or as many more as
    hold ``keep_mass`` of the sum of M. The question is the text of the last user's turn where turns are known
    (``wrap(..., processor=...)``), else what follows the last image. After the prompt the layers above the watershed
    evict the tokens of the others, or with ``memory`` "read" leave them where they are and do not read them; then every
    part of the prompt with a question chooses anew.

    The paper chooses among rounds of a dialogue, and the watershed by a fit; images in their place and the middle layer
    are ours. Counts evicted slots, or steps of a layer that read a part.

    Raises:
        OptionError: a watershed that is no layer, or the last.
        UnsupportedError: a static cache, no cache.
    """

    watershed: str = option("1/2", about="the layer that chooses; a/b is a share of the depth", source="ours")
    turns = "used"
    keep_share: float = option(0.1, 0, 1, "share of the images that stay", source="paper: .1 of the rounds")
    keep_mass: float = option(0.0, 0, 1, "or more, up to this share of the gaze on images", source="ours")
    memory: str = option("evict", about="what becomes of the others", choices=("evict", "read"))

    def at(self, share: float) -> Rounds:
        """``share`` is that of the gaze on images, not of the tokens."""
        return replace(self, keep_share=0.0, keep_mass=share)

    def bind(self, anatomy: Anatomy) -> Rounds:
        found = parse_layers(self.watershed, anatomy.layers, "rounds.watershed")
        if len(found) != 1 or found[0] >= anatomy.layers - 1:
            raise OptionError(f"rounds.watershed must name one layer before the last, got '{self.watershed}'")
        if (watershed := anatomy.attending_before(found[0] + 1)) < 0:
            raise OptionError(
                f"rounds.watershed: no layer up to {found[0]} has attention; name one of"
                f" {list(anatomy.attending or ())}"
            )
        above = [layer for layer in self.active_layers(anatomy) if layer > watershed]
        bound = replace(self, watershed=str(watershed), layers=",".join(map(str, above)))
        KVPolicy.bind(bound, anatomy)
        return bound

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return (int(self.watershed),)

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        seen = rows_seen(context, weights, asking=self._question(context)).mean(1)
        visual, number = image_tokens(context), context.images.long()
        count = int(number.max()) + 1  # one look per prompt
        mass = torch.zeros(len(seen), count, device=seen.device).scatter_add_(1, number.clamp_min(0), seen * visual)
        ranked = mass.sort(dim=1, descending=True, stable=True)
        before = ranked.values.cumsum(1) - ranked.values
        images = number.amax(1, keepdim=True) + 1
        most = (self.keep_share * images).round().clamp_min(1)
        stays = (torch.arange(count, device=seen.device) < most) | (before < self.keep_mass * mass.sum(1, keepdim=True))
        context.request.store(self).rows["images"] = torch.zeros_like(stays).scatter_(1, ranked.indices, stays)

    @staticmethod
    def _question(context: LayerContext) -> torch.Tensor:
        """bool ``[batch, keys]``: tokens of the question, or the last one where it has none."""
        if context.request.turns_known:
            asks = ~context.visual & (context.roles == USER) & (context.turns == context.turns.amax(1, keepdim=True))
        else:
            asks = context.visual.flip(1).cumsum(1).flip(1) == 0
        start = context.step.start or 0
        asks[:, :start] = False
        asks[:, context.request.prompt_length - 1] |= ~asks.any(1)
        return asks

    def _stay(self, context: LayerContext) -> torch.Tensor:
        """bool ``[batch, keys]``: slots that are no token of another image."""
        chosen: torch.Tensor = context.request.store(self).rows["images"].to(context.device)
        return ~context.visual | chosen.gather(1, context.images.long().clamp_min(0))

    def evict(self, context: LayerContext) -> Eviction | None:
        if not context.step.is_prompt:
            return None
        stay = self._stay(context)
        if self.memory == "read":
            held = stay if context.real is None else stay & context.real
            context.store(self).shared["most"] = int(held.sum(1).max()) - context.keys  # one look per layer and prompt
            return None
        _, text = host_counts(context.request, context.keys)
        images = (stay & image_tokens(context)).sum(1).tolist()
        return Eviction(stay, tuple(n + words for n, words in zip(images, text, strict=True)))

    def edit(self, context: LayerContext) -> AttentionEdit:
        if self.memory == "evict" or context.step.is_prompt:
            return AttentionEdit()
        stay = self._stay(context)
        if (real := context.real) is not None:
            stay = stay & real
        context.count("rounds", 1)
        return AttentionEdit(read=slots_of(stay, context.store(self).shared["most"] + context.keys))
