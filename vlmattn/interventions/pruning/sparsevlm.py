"""SparseVLM: the words of the question that see the image choose its tokens (arXiv 2410.04417)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.interventions.pruning.base import Staged
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import KeptTokens, LayerContext, PruningStage, Weights

_ROWS = 64  # rater rows whose attention is looked at together


def _of_576(*tokens: int) -> tuple[float, ...]:
    """The released counts, for the 576 tokens of LLaVA-1.5, as shares."""
    return tuple(count / 576 for count in tokens)


@register(
    "sparsevlm",
    paper="arXiv:2410.04417 (ICML 2025)",
    code="github.com/Gumpest/SparseVLMs",
    faithful="golden",
    parts="keep",
    cost="prefill: attention rows of the raters in three layers; later layers run on the rest. Decode: fewer keys",
    presets={
        "sparsevlm": ("released code, 192 tokens of LLaVA-1.5 on average, dropped tokens merged", {}),
        "sparsevlm_128": ("released code, 128 tokens", {"keep_ratios": _of_576(303, 110, 36)}),
        "sparsevlm_96": ("released code, 96 tokens", {"keep_ratios": _of_576(238, 48, 26)}),
        "sparsevlm_64": ("released code, 64 tokens", {"keep_ratios": _of_576(66, 30, 17)}),
        "sparsevlm_plus": (
            "released code 2.0, 192 tokens: no merging, position bias divided out, heads chosen",
            {"version": "2", "keep_ratios": _of_576(300, 200, 118)},
        ),
        "sparsevlm_plus_128": ("released code 2.0, 128 tokens", {"version": "2", "keep_ratios": _of_576(238, 108, 60)}),
        "sparsevlm_plus_96": ("released code 2.0, 96 tokens", {"version": "2", "keep_ratios": _of_576(246, 54, 28)}),
        "sparsevlm_plus_64": ("released code 2.0, 64 tokens", {"version": "2", "keep_ratios": _of_576(66, 34, 20)}),
    },
)
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Staged):
    """Go on with the image tokens that the rater words of the question attend to most, and merge some of the others.

    With E the embeddings that enter the decoder (v image tokens, t text after the image):

        m_t = mean_v softmax_t(E_v . E_t);   raters: m_t > mean_t m
        s_j = mean over heads and raters r of A[h, r, j],   A the unedited attention of the layer before the stage

    round(r_i n) image tokens of n in the prompt stay before stage i, at most all but one of those that are left.
    Version 1 merges: of the m dropped ones the int(.3 m) + 1 with the highest s fall into a tenth as many clusters
    (density peaks), whose means follow the kept image tokens, and positions are counted anew. Version 2 divides A by
    what the rotation alone gives, q . k / sqrt(dim) of rotated ones, averages over the ``head_share`` of heads whose
    raters look most, keeps position ids and merges nothing.

    Text between images counts as text after the image. Ties of density go to the first token, where the released code
    adds noise. Counts dropped tokens.

    Raises:
        OptionError: as many ratios as layers are missing, ratios that rise, layers out of range.
    """

    keeping: ClassVar[str] = "use version='2'"
    layers: str = option("3/32,7/32,16/32", about="first layers of the stages", source="released: after 2, 6, 15 of 32")
    keep_ratios: tuple[float, ...] = option(
        _of_576(300, 200, 110), about="share of the image tokens, by stage", source="released"
    )
    version: str = option("1", about="released version of the code", choices=("1", "2"))
    recycle: float = option(0.3, 0, 1, "version 1: share of the dropped tokens that is merged", source="released")
    cluster_size: int = option(10, 1, 10**6, "version 1: tokens of a cluster on average", source="released")
    head_share: float = option(14 / 32, 0, 1, "version 2: share of the heads", source="released: 14 of 32")

    @property
    def compact(self) -> bool:
        return self.version == "1"

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return tuple(map(anatomy.attending_before, self.stages(anatomy)))

    def on_embeddings(self, stage: PruningStage) -> None:
        """Find the raters."""
        after = stage.text & (stage.visual.cumsum(1) > 0)
        words = after.any(0).nonzero().flatten()
        scores = stage.hidden.float() @ stage.hidden[:, words].float().transpose(1, 2)  # [batch, row, word]
        share = scores.masked_fill(~after[:, None, words], float("-inf")).softmax(-1).nan_to_num()
        share = (share * stage.visual[..., None]).sum(1) / stage.visual.sum(1, keepdim=True).clamp_min(1)
        mean = share.sum(1, keepdim=True) / after.sum(1, keepdim=True).clamp_min(1)
        raters = torch.zeros_like(after).index_copy_(1, words, after[:, words] & (share > mean))
        stage.request.store(self).by_slot("raters", False, torch.bool).write(stage.start, raters)

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        start = context.step.start or 0
        kept = context.request.store(self)
        raters = context.request.read(kept.slots["raters"], start + context.queries, context.device)[:, start:]
        rows = raters.any(0).nonzero().flatten()
        seen = []
        for few in torch.split(rows, _ROWS) if len(rows) else ():
            first, last = int(few[0]), int(few[-1]) + 1
            found = weights(first, last)[..., start : start + context.queries]
            seen.append(found[:, :, few - first] * raters[:, None, few, None])
        empty = raters.new_zeros(len(raters), context.heads, 0, context.queries, dtype=torch.float32)
        kept.shared["rows"] = rows
        kept.rows |= {"raters": raters[:, rows], "gaze": torch.cat(seen, 2) if seen else empty}

    def score(self, stage: PruningStage) -> Tensor:
        """s, float32 ``[batch, rows]``."""
        kept = stage.request.store(self)
        rows, raters = kept.shared.pop("rows"), kept.rows.pop("raters")
        seen = kept.rows.pop("gaze")  # [batch, heads, rater, rows]
        if self.version == "2":
            if stage.tables is not None:
                bias = _rotation_alone(*stage.tables)
                seen = seen / bias[:, None, rows.to(bias.device)]
            per_head = (seen * stage.visual[:, None, None]).sum((2, 3))
            top = per_head.topk(max(1, round(self.head_share * seen.shape[1])), dim=1).indices
            seen = seen.gather(1, top[:, :, None, None].expand(-1, -1, *seen.shape[2:]))
        found: Tensor = seen.mean(1).sum(1) / raters.sum(1, keepdim=True).clamp_min(1)
        return found

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        chosen = self._chosen(layer, given, left)
        return chosen + self._clusters(left - chosen)[1]

    def _chosen(self, layer: int, given: Sequence[int], left: int) -> int:
        """Image tokens that stay as they are."""
        ratio = self.ratio(layer)
        return min(round(ratio * sum(given)), max(left - 1, 0))

    def _clusters(self, dropped: int) -> tuple[int, int]:
        """How many of the dropped tokens are merged, and into how many."""
        if self.version == "2" or not dropped or not self.recycle:
            return 0, 0
        merged = int(dropped * self.recycle) + 1
        return merged, int(merged / self.cluster_size) + 1

    def choose_tokens(self, stage: PruningStage) -> KeptTokens:
        scores, after = self.score(stage), self.counts(stage)
        chosen = [self._chosen(stage.layer, *counts) for counts in zip(stage.given, stage.counts, strict=True)]
        keep = stage.top(scores, chosen)
        if chosen == list(after):
            return KeptTokens(keep, after)
        hidden = stage.hidden.clone()
        for row, (count, left) in enumerate(zip(chosen, stage.counts, strict=True)):
            taken, clusters = self._clusters(left - count)
            if not clusters:
                continue
            mine, others = keep[row].nonzero().flatten(), (stage.visual[row] & ~keep[row]).nonzero().flatten()
            best = others[scores[row, others].topk(taken).indices]
            content = torch.cat([hidden[row, mine], cluster_means(stage.hidden[row, best], clusters)])
            places = torch.cat([mine, others[-clusters:]]).sort().values  # merged tokens follow the kept ones
            hidden[row, places] = content
            keep[row, places] = True
        return KeptTokens(keep, after, hidden)


def cluster_means(tokens: Tensor, clusters: int) -> Tensor:
    """Means ``[clusters, hidden]`` of the density-peak clusters of ``tokens`` ``[count, hidden]``.

    With d_ij = ||x_i - x_j|| / sqrt(hidden): density rho_i = exp(-mean over the ``clusters`` nearest of d^2), delta_i
    the distance to the nearest token of higher density (the largest distance for the densest); the tokens with the
    highest rho delta are centres, and every token joins the nearest centre.
    """
    distance = torch.cdist(tokens.float()[None], tokens.float()[None])[0] / tokens.shape[-1] ** 0.5
    density = (-distance.topk(min(clusters, len(tokens)), largest=False).values.square().mean(-1)).exp()
    density = density - 1e-6 * torch.linspace(0, 1, len(tokens), device=tokens.device)  # no two are the same
    higher = density[None, :] > density[:, None]
    delta = torch.where(higher, distance, distance.max()).min(-1).values
    centres = (delta * density).topk(clusters).indices
    member = distance[:, centres].argmin(-1)
    member[centres] = torch.arange(clusters, device=tokens.device)
    sums = torch.zeros(clusters, tokens.shape[-1], device=tokens.device).index_add_(0, member, tokens.float())
    counts = torch.bincount(member, minlength=clusters)[:, None]
    return (sums / (counts + 1e-6)).to(tokens)


def _rotation_alone(cos: Tensor, sin: Tensor) -> Tensor:
    """Scores of queries and keys of ones after the rotation, float32 ``[batch, query, key]``."""
    half = torch.ones_like(cos[..., : cos.shape[-1] // 2])
    turned = cos.float() + torch.cat([-half, half], -1) * sin.float()
    scores: Tensor = turned @ turned.transpose(1, 2) / cos.shape[-1] ** 0.5
    return scores
