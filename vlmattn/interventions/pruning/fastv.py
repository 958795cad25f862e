"""FastV: drop the image tokens that the last prompt token looks at least (arXiv 2403.06764)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlmattn.anatomy import Anatomy
from vlmattn.interventions.pruning.base import Pruning, budget
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import KeptTokens, LayerContext, PruningStage, Weights


@register(
    "fastv",
    paper="arXiv:2403.06764 (ECCV 2024)",
    code="github.com/pkunlp-icler/FastV",
    faithful="golden",
    parts="keep",
    cost="prefill: one attention row in the layer before; later layers run on the rest. Decode: fewer keys",
    presets={
        "fastv": ("paper: half of the image tokens from layer 2 on", {}),
        "fastv_k3_r75": (
            "released demo: a quarter of the image tokens from layer 3 on",
            {"layer": 3, "keep_ratio": 0.25},
        ),
    },
)
@dataclass(frozen=True, kw_only=True)
class FastV(Pruning):
    """From layer K on go on with the image tokens that the last prompt token attends to most in layer K - 1.

    With A the unedited attention ``[batch, heads, query, key]`` of layer K - 1 and q the last prompt row:

        s_j = mean_h A[h, q, j];   the round(keep_ratio n) image tokens of a sequence with the highest s stay

    n counts the image tokens of all images of a sequence together. Kept rows have their order and their position ids; text
    stays. Chosen once, while the prompt is read. A later turn with images is pruned by itself. Counts dropped tokens.

    The paper's R is 1 - ``keep_ratio``.

    Raises:
        OptionError: ``layer`` 0 or not a layer of the model, or one in which image features still come in (DeepStack).
    """

    layer: int = option(2, 0, 10**4, "K, the first layer that only kept tokens reach", source="paper: 2")
    keep_ratio: float = option(0.5, 0, 1, "share of the image tokens that stays", source="paper: R = .5")
    keep_tokens: int = option(0, 0, 10**6, "image tokens of a sequence that stay; 0: by keep_ratio")

    def at(self, share: float) -> FastV:
        return replace(self, keep_ratio=share, keep_tokens=0)

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return (self.layer,)

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return (self.layer - 1,)

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        start = context.step.start or 0
        row = context.request.prompt_length - 1 - start
        seen = weights(row, row + 1)[:, :, 0, start : start + context.queries].mean(1)
        context.request.store(self).rows["gaze"] = seen

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        return budget(self.keep_ratio, self.keep_tokens, sum(given))

    def choose_tokens(self, stage: PruningStage) -> KeptTokens:
        counts = self.counts(stage)
        return KeptTokens(stage.top(stage.request.store(self).rows["gaze"], counts), counts)
