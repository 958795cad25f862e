"""FastV: drop the image tokens that the last prompt token looks at least (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.interventions.base import last_row
from vlmattn.interventions.pruning.base import ScorerPruning
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext, PruningStage, Weights


@register(
    "fastv",
    paper="arXiv:2403.06764 (ECCV 2024)",
    code="github.com/pkunlp-icler/FastV",
    faithful="golden",
    parts="keep",
    cost="prefill: one attention row in the layer before; later layers run on the rest. Decode: fewer keys",
    presets={
        "fastv": ("paper: half of the image tokens from layer 2 on", {}),
        "fastv_k3_r75": ("released demo: a quarter from layer 3 on", {"layer": 3, "keep_ratio": 0.25}),
    },
)
@dataclass(frozen=True, kw_only=True)
class FastV(ScorerPruning):
    """From layer K on go on with the image tokens that the last prompt token attends to most in layer K - 1.

    With A the unedited attention ``[batch, heads, query, key]`` of layer K - 1 (the last before K that has attention)
    and q the last prompt row:

        s_j = mean_h A[h, q, j];   the round(keep_ratio n) image tokens of a sequence with the highest s stay

    n counts the image tokens of all images of a sequence together. Kept rows have their order and their position ids;
    text stays. Chosen once, while the prompt is read. A later turn with images is pruned by itself. Counts dropped
    tokens.

    The paper's R is 1 - ``keep_ratio``.

    Raises:
        OptionError: ``layer`` 0 or not a layer of the model, or one in which image features still come in (DeepStack).
    """

    layer: int = option(2, 0, 10**4, "K, the first layer that only kept tokens reach", source="paper: 2")
    keep_ratio: float = option(0.5, 0, 1, "share of the image tokens that stays", source="paper: R = .5")

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return (anatomy.attending_before(self.layer),)

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        seen = last_row(context, weights).mean(1)
        context.request.store(self).rows["seen"] = context.of_rows(seen, 0)

    def score(self, stage: PruningStage) -> Tensor:
        seen: Tensor = stage.request.store(self).rows["seen"]
        return seen
