"""VisionZip: keep the image tokens that the vision tower looks at, merge the others by likeness (arXiv 2412.04467)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError
from vlmattn.interventions.base import check_tower
from vlmattn.interventions.pruning.base import Pruning
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import Image, ImageFeatures, KeptTokens, PruningStage


@register(
    "visionzip",
    paper="arXiv:2412.04467 (CVPR 2025)",
    code="github.com/dvlab-research/VisionZip",
    faithful="golden (with CLIP towers and compact positions)",
    parts="keep",
    cost="all layers run on the rest, from the first on; the vision tower is as it was. Decode: fewer keys",
    presets={
        "visionzip": ("released README: 64 of the 576 tokens of LLaVA-1.5", {}),
        "visionzip_128": ("paper: 128 tokens", {"dominant": 108 / 576, "contextual": 20 / 576}),
        "visionzip_192": ("paper: 192 tokens", {"dominant": 162 / 576, "contextual": 30 / 576}),
        "visionzip_positions": ("64 of 576 tokens at their own positions", {"positions": "original"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class VisionZip(Pruning):
    """Give the language model few tokens of each image, chosen and merged by the vision tower, whatever is asked.

    With a the attention of the CLS token in the last but one layer of the tower, summed over heads, of an image of n
    tokens, D = round(dominant n) and C = round(contextual n):

        dominant:    the CLS token itself and the D - 1 tokens with the highest a, in their order
        contextual:  every k-th of the other m tokens is a target, k = m // C, C of them; each of the rest joins the
                     target whose key (mean over heads, normalised) is most alike: target + mean of those that joined it

    Merging is before the projection to the language model where the tower allows it (LLaVA), else after it. Towers
    without a CLS token: a is the mean query's attention (ours), and D tokens are chosen; the same with ``positions``
    "original", where tokens keep their position ids and a contextual token has its target's. "compact" counts them
    anew, as a prompt with fewer tokens. Counts dropped tokens.

    Raises:
        OptionError: nothing would stay, a tower of one layer, a model that adds image features in later layers; compact
            positions on a model whose tokens have several (M-RoPE).
        InputError: image features were given instead of pixels.
    """

    earliest: ClassVar[int] = 0
    dominant: float = option(54 / 576, 0, 1, "share of tokens kept", source="released README: 54 of 576")
    contextual: float = option(10 / 576, 0, 1, "share of merged tokens", source="released README: 10 of 576")
    positions: str = option(
        "compact", about="position ids", source="released: counted anew", choices=("compact", "original")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.dominant + self.contextual <= 1:
            raise OptionError(
                f"visionzip keeps dominant + contextual = {self.dominant + self.contextual:g} of the tokens; it must"
                " lie within 0..1"
            )

    @property
    def compact(self) -> bool:
        return self.positions == "compact"

    def at(self, share: float) -> VisionZip:
        whole = self.dominant + self.contextual
        dominant, contextual = share * self.dominant / whole, share * self.contextual / whole
        return replace(self, dominant=dominant, contextual=min(contextual, 1 - dominant))

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return (0,)

    def tower_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        check_tower("visionzip", anatomy)
        return (anatomy.tower_layers - 2,)

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        return sum(sum(self._budget(count)) for count in given)

    def _budget(self, tokens: int) -> tuple[int, int]:
        """Dominant and contextual tokens of an image."""
        dominant = max(round(self.dominant * tokens), 1)
        return dominant, min(round(self.contextual * tokens), tokens - dominant)

    def on_image_features(self, features: ImageFeatures) -> None:
        contents, stays = [], []
        for image in features.images:
            content, stay = self._zip(image)
            contents.append(content)
            stays.append(stay)
        features.request.store(self).rows |= {"content": features.place(contents), "stay": features.place(stays)}

    def _zip(self, image: Image) -> tuple[Tensor, Tensor]:
        """What the image's slots hold ``[tokens, width]`` and which of them stay, bool ``[tokens]``."""
        (layer,) = image.attention
        seen, keys = image.attention[layer].sum(0), image.keys[layer]
        count, (dominant, contextual) = len(seen), self._budget(len(seen))
        with_cls = image.summary is not None and self.compact
        top = seen.topk(dominant - with_cls).indices.sort().values
        others = torch.ones_like(seen, dtype=torch.bool).index_fill_(0, top, False).nonzero().flatten()
        step = max(1, len(others) // contextual) if contextual else 1
        targets = others[::step][:contextual]
        merged = self._merged(image.features, keys, others, targets) if contextual else image.features[:0]
        if not self.compact:
            content = image.features.clone()
            content[targets] = merged
            stay = torch.zeros_like(seen, dtype=torch.bool)
            stay[torch.cat([top, targets])] = True
            return image.project(content), stay
        parts = [image.features[top], merged]
        if with_cls:
            assert image.summary is not None
            parts.insert(0, image.summary[None])
        projected = image.project(torch.cat(parts))
        content = projected.new_zeros(count, projected.shape[-1])
        content[: len(projected)] = projected
        return content, torch.arange(count, device=seen.device) < len(projected)

    def _merged(self, features: Tensor, keys: Tensor, others: Tensor, targets: Tensor) -> Tensor:
        """Contextual tokens ``[targets, width]``."""
        joining = others[~torch.isin(others, targets)]
        likeness = normalize(keys, dim=-1)
        where = (likeness[joining] @ likeness[targets].T).argmax(-1)
        sums = torch.zeros(len(targets), features.shape[-1], device=features.device, dtype=features.dtype)
        sums.index_add_(0, where, features[joining])
        counts = torch.bincount(where, minlength=len(targets)).clamp_min(1)[:, None]
        return features[targets] + (sums / counts).to(features)

    def choose_tokens(self, stage: PruningStage) -> KeptTokens:
        rows = stage.request.store(self).rows
        content, stay = rows.pop("content"), rows.pop("stay")
        more = stage.hidden.shape[1] - stay.shape[1]  # tokens behind the prompt
        content, stay = pad(content, (0, 0, 0, more)), pad(stay, (0, more))
        hidden = torch.where(stay[..., None], content.to(stage.hidden), stage.hidden)
        return KeptTokens(stay & stage.visual, self.counts(stage), hidden)
