"""PyramidDrop: fewer image tokens from stage to stage (arXiv 2410.17247)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmattn.interventions.pruning.base import Staged
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import PruningStage


@register(
    "pyramiddrop",
    paper="arXiv:2410.17247 (CVPR 2025)",
    code="github.com/Cooperx521/PyramidDrop",
    faithful="golden",
    parts="keep",
    cost="prefill: queries and keys of three layers once more; later layers run on the rest. Decode: fewer keys",
    presets={
        "pyramiddrop": (
            "released code: half of the image tokens, a quarter, an eighth, at each quarter of the depth",
            {},
        ),
        "pyramiddrop_positions": ("the same with the tokens' own position ids", {"positions": "original"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Staged):
    """Before each stage's layer m keep the image tokens that the last prompt token would attend to most in m.

    With A the attention that layer m would pay on the rows that are still there, n image tokens in the prompt:

        s_j = mean_h A[h, last row, j];   int(n r_i) image tokens stay before stage i

    Ratios are shares of the tokens that the prompt had. Position ids are counted anew after each stage ("compact", as
    released) or stay as they are ("original"). Counts dropped tokens.

    Raises:
        OptionError: as many ratios as layers are missing, ratios that rise, layers out of range; compact positions on a
            model whose tokens have several (M-RoPE).
    """

    looks_ahead: ClassVar[bool] = True
    layers: str = option("8/32,16/32,24/32", about="first layers of the stages", source="released: 8, 16, 24 of 32")
    keep_ratios: tuple[float, ...] = option(
        (0.5, 0.25, 0.125), about="share of the image tokens, by stage", source="released"
    )
    positions: str = option(
        "compact", about="position ids", source="released: counted anew", choices=("compact", "original")
    )

    @property
    def compact(self) -> bool:
        return self.positions == "compact"

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        return int(self.ratio(layer) * sum(given))

    def score(self, stage: PruningStage) -> Tensor:
        row = stage.request.prompt_length - 1 - stage.start
        seen = stage.weights(row, row + 1)[:, :, 0].mean(1)
        return seen[:, stage.start : stage.start + stage.hidden.shape[1]]
