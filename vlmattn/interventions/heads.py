"""Head steering: block or amplify the heads that decide which modality an answer follows (arXiv 2602.03677)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError
from vlmattn.files import beside
from vlmattn.interventions.base import Intervention
from vlmattn.interventions.profiles import HeadProfile, check_heads
from vlmattn.kernels import AttentionEdit, HeadPart, MaskPart, Rows
from vlmattn.options import option, parse_heads, parse_layers
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "heads",
    paper="arXiv:2602.03677",
    code="not available",
    faithful="experimental",
    parts="head gain or mask",
    cost="one multiplication (cut: dense rows in prefill)",
    presets={
        "heads_block": ("silence the 5 % of heads with the largest causal effect", {"operation": "block"}),
        "heads_amplify": ("double the 5 % of heads with the largest causal effect", {"operation": "amplify"}),
        "heads_cut": ("the same heads do not see the image any more", {"operation": "cut"}),
        "heads_amplify_random": ("control: double 5 % of heads, drawn", {"operation": "amplify", "score": "random"}),
        "heads_random_half": (
            "control of vhr: double half of the heads of its layers, drawn at random, on all rows",
            {"operation": "amplify", "score": "random", "share": 0.5, "layers": "1,-14:", "rows": "all"},
        ),
    },
)
@dataclass(frozen=True, kw_only=True)
class Heads(Intervention):
    """Silence, replace or amplify single heads, or blind them to the image.

        operation "block":    out_h <- 0 (``ablation`` "zero") or out_h <- mean output of the head ("mean")
        operation "amplify":  out_h <- gain out_h
        operation "cut":      head h does not see image keys

    on text rows after an image and all generated rows (``rows`` "instruction"), or on all rows. Which heads: ``heads``,
    or the top ``share`` of a score in a HeadProfile; ``vlmattn.inspection.find_heads`` ranks heads by their causal
    effect on which modality the answer follows. The score "random" draws that share instead, by ``seed``: a control.
    The paper's operator and scale are not known to us: experimental. Counts heads.

    Raises:
        OptionError: no heads given and no profile beside the model; a profile of another model; a head or layer that
            the model does not have; mean ablation without a profile that has means.
    """

    files: ClassVar[Mapping[str, str]] = {"profile": HeadProfile.FILE_NAME}
    operation: str = option("block", about="what happens to the heads", choices=("block", "amplify", "cut"))
    heads: str = option("", about="layer.head pairs such as '12.3,14.7'; empty: the top share of the profile")
    profile: str = option("", about="HeadProfile file; empty: vlmattn_heads.json beside the model")
    score: str = option("causal", about="score of the profile that ranks heads; random: none, they are drawn")
    share: float = option(0.05, 0, 1, "share of all heads", source="paper: 5 %")
    gain: float = option(2.0, 0, 10, "factor of amplified heads", source="ours: middle of 1.5..3")
    ablation: str = option("zero", about="what a blocked head says instead", choices=("zero", "mean"))
    seed: int = option(0, 0, 2**31 - 1, "of the draw")
    rows: str = option("instruction", about="rows that are steered", choices=("instruction", "all"))

    def bind(self, anatomy: Anatomy) -> Heads:
        mean, path = self.operation == "block" and self.ablation == "mean", self.profile
        chosen = parse_heads(self.heads, "heads.heads") or (self._drawn(anatomy) if self.score == "random" else ())
        if mean or not chosen:
            path = path or str(beside(anatomy.source, HeadProfile.FILE_NAME) or "")
            if not path:
                raise OptionError(
                    "heads: which heads? Give heads='12.3,14.7', or measure them: find_heads(model,"
                    " samples).save(folder of the model), and name the file with profile=..."
                )
        if path:
            found = _load(path)
            found.check(anatomy, "heads.profile")
            if mean and not found.means:
                raise OptionError(f"heads: {path} has no mean outputs, which mean ablation needs; use ablation='zero'")
            chosen = chosen or found.top(self.score, self.share)
        check_heads(chosen, anatomy, anatomy.heads, "heads", "head")
        bound = replace(self, heads=",".join(f"{layer}.{head}" for layer, head in sorted(chosen)), profile=path)
        bound.active_layers(anatomy)
        return bound

    def _drawn(self, anatomy: Anatomy) -> tuple[tuple[int, int], ...]:
        """The share of the heads of ``layers``, at random, at least one."""
        layers = parse_layers(self.layers, anatomy.layers, "heads.layers")
        places = [(layer, head) for layer in layers for head in range(anatomy.heads)]
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return tuple(places[n] for n in order[: max(1, round(self.share * len(places)))])

    def active_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        inside = parse_layers(self.layers, anatomy.layers, "heads.layers")
        found = tuple(sorted({layer for layer, _ in parse_heads(self.heads, "heads.heads")} & set(inside)))
        if found and anatomy.cross and self.operation == "cut":
            found = tuple(layer for layer in found if layer in anatomy.cross)
        if not found:
            raise OptionError(f"heads.layers '{self.layers}' has none of the heads {self.heads}")
        return found

    @property
    def acts_on(self) -> str:  # type: ignore[override]
        return "image keys" if self.operation == "cut" else "heads"

    @property
    def edits_text(self) -> bool:
        return self.rows == "all"

    def hides(self) -> frozenset[str]:
        return frozenset({"text-image"} if self.operation == "cut" else ())

    def edit(self, context: LayerContext) -> AttentionEdit:
        mine = [head for layer, head in parse_heads(self.heads, "heads.heads") if layer == context.layer]
        rows = None if self.rows == "all" else context.rows_after_image()
        context.count("heads", len(mine))
        if self.operation == "cut":
            return AttentionEdit(mask=(self._cut(context, mine, rows),))
        return AttentionEdit(head_gain=(self._scaled(context, mine, rows),))

    def _scaled(self, context: LayerContext, mine: list[int], rows: Rows | None) -> HeadPart:
        def make() -> tuple[Tensor, Tensor | None]:
            gain = torch.ones(1, context.heads, device=context.device)
            gain[:, mine] = self.gain if self.operation == "amplify" else 0.0
            if self.operation == "amplify" or self.ablation == "zero":
                return gain, None
            means = torch.tensor(_load(self.profile).means[context.layer], device=context.device)[None]
            return gain, means * (gain == 0)[..., None]

        gain, offset = context.store(self).once("gain", make)
        return HeadPart(gain, rows, offset)

    def _cut(self, context: LayerContext, mine: list[int], rows: Rows | None) -> MaskPart:
        def make() -> Tensor:
            heads = torch.zeros(1, context.heads, dtype=torch.bool, device=context.device)
            heads[:, mine] = True
            return heads

        ids = torch.where(context.visual, 0, -1)
        inside = context.of_rows(~context.visual, True) if rows is None else rows.mask
        return MaskPart(torch.where(inside, 0, -1), ids, 0.0, heads=context.store(self).once("heads", make))


def _load(path: str) -> HeadProfile:
    try:
        return _load_version(path, os.stat(path).st_mtime_ns)
    except (OSError, ValueError):
        return HeadProfile.load(path)  # says what is wrong


@lru_cache(maxsize=8)
def _load_version(path: str, changed: int) -> HeadProfile:
    return HeadProfile.load(path)
