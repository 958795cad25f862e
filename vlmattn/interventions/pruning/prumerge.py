"""LLaVA-PruMerge: tokens that the vision tower looks at stay, others are merged into them (arXiv 2403.15388)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from vlmattn.anatomy import Anatomy
from vlmattn.errors import UnsupportedError
from vlmattn.interventions.base import check_tower
from vlmattn.interventions.pruning.base import Pruning
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import Image, ImageFeatures, KeptTokens, PruningStage


@register(
    "prumerge",
    paper="arXiv:2403.15388 (ICCV 2025)",
    code="github.com/42Shawn/LLaVA-PruMerge",
    faithful="released code, formula checked; attention by head, and tokens at their own places (ours)",
    parts="keep",
    cost="all layers run on the rest, from the first on; the vision tower is as it was. Decode: fewer keys",
    presets={
        "prumerge": ("paper: as many tokens as are outliers of what the tower looks at, others merged into them", {}),
        "prumerge_plus": ("paper: PruMerge+, with tokens spread evenly besides", {"spread": True}),
    },
)
@dataclass(frozen=True, kw_only=True)
class PruMerge(Pruning):
    """Give the language model the tokens of an image that stand out in its vision tower, with others merged into them.

    With a the attention of the CLS token in the tower's last layer, mean over heads, k the keys there and x what the
    tower says of the n tokens of an image, r the share of tokens with a > Q3 + 1.5 (Q3 - Q1), or ``keep_ratio``:

        S: the int(r n) tokens with the highest a; with ``spread`` every int(s / 3)-th from int(s / 6), s = int(1 / r)
        x_i := x_i + sum_j a_j x_j  over the ``near`` tokens j with keys most like that of i in S
        one token more: the sum of a_j x_j over all that are not in S

    before the projection to the language model where the tower allows it (LLaVA), else after it. The number of tokens
    depends on the picture; ``prumerge@0.1`` fixes r. Kept tokens have their own position ids, the one more that of the
    last token that goes; the released code counts positions anew. It takes a from queries and keys of all heads
    together, as one head; here a is the mean over heads. Towers without a CLS token: the mean query's attention (ours).
    Counts dropped tokens.

    Raises:
        OptionError: a model that adds image features in later layers. UnsupportedError: a family whose image tokens are
            not those of its tower. InputError: image features were given instead of pixels.
    """

    earliest: ClassVar[int] = 0
    keep_ratio: float = option(0.0, 0, 1, "r; 0: as many as stand out in each picture", source="paper: adaptive")
    spread: bool = option(False, about="tokens spread evenly stay too (PruMerge+)")
    near: int = option(32, 1, 10**4, "tokens merged into each one", source="released: 32")

    def at(self, share: float) -> PruMerge:
        return replace(self, keep_ratio=share)

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return (0,)

    def tower_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        check_tower("prumerge", anatomy)
        return (anatomy.tower_layers - 1,)

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        if not self.keep_ratio or self.spread:
            raise UnsupportedError(
                "how many tokens prumerge keeps is known only once the picture is read; give a budget and no spread:"
                " prumerge@0.1"
            )
        return sum(min(max(int(self.keep_ratio * tokens), 1) + 1, tokens) for tokens in given)

    def comparing(self, layer: int, given: Sequence[int], width: int) -> int:
        return sum(2 * width * tokens * max(int(self.keep_ratio * tokens), 1) for tokens in given)

    def on_image_features(self, features: ImageFeatures) -> None:
        contents, stays = zip(*map(self._merge, features.images), strict=True)
        rows = {"content": features.place(list(contents)), "stay": features.place(list(stays))}
        features.request.store(self).rows |= rows

    def _chosen(self, seen: Tensor) -> Tensor:
        """S, bool ``[tokens]``."""
        count = len(seen)
        if (ratio := self.keep_ratio) == 0:
            low, high = seen.quantile(0.25), seen.quantile(0.75)
            ratio = float((seen > high + 1.5 * (high - low)).float().mean())
        stays = torch.zeros_like(seen, dtype=torch.bool)
        stays[seen.argsort(descending=True, stable=True)[: max(int(count * ratio), 1)]] = True
        if self.spread:
            step = int(1 / max(ratio, 1 / count))
            stays[int(step / 6) : count - 1 : max(int(step / 3), 1)] = True
        return stays

    def _merge(self, image: Image) -> tuple[Tensor, Tensor]:
        """What the image's slots hold ``[tokens, width]`` and which of them stay, bool ``[tokens]``."""
        ((layer, heads),) = image.attention.items()
        seen, unit = heads.mean(0), normalize(image.keys[layer], dim=-1)
        stays, said = self._chosen(seen), image.features.float()
        alike = unit[stays] @ unit.T
        alike[torch.arange(len(alike)), stays.nonzero().flatten()] = float("-inf")  # not into itself
        near = alike.topk(min(self.near, len(seen) - 1), dim=1).indices
        weighted = seen[:, None] * said
        content = said.clone()
        content[stays] = said[stays] + weighted[near].sum(1)
        gone = (~stays).nonzero().flatten()
        if len(gone):
            content[gone[-1]] = weighted[gone].sum(0)
            stays = stays.index_fill(0, gone[-1], True)
        return image.project(content.to(image.features)), stays

    def choose_tokens(self, stage: PruningStage) -> KeptTokens:
        rows = stage.request.store(self).rows
        content, stay = rows.pop("content"), rows.pop("stay")
        more = stage.hidden.shape[1] - stay.shape[1]  # tokens behind the prompt
        content, stay = pad(content, (0, 0, 0, more)), pad(stay, (0, more)) & stage.visual
        hidden = torch.where(stay[..., None], content.to(stage.hidden), stage.hidden)
        return KeptTokens(stay, tuple(stay.sum(1).tolist()), hidden)
