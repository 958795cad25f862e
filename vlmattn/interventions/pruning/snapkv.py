"""SnapKV: the tokens that the end of the prompt attends to (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool1d

from vlmattn.errors import OptionError
from vlmattn.interventions.pruning.budget import AttentionBudget, above, newest, rows_seen
from vlmattn.kernels import AttentionEdit
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext, Weights


@register(
    "snapkv",
    paper="arXiv:2404.14469 (NeurIPS 2024)",
    code="kvpress' SnapKVPress",
    faithful="golden (kept slots, kvpress)",
    parts="keep",
    cost="prefill: a few attention rows a layer; decode: few tokens are held, and read",
    presets={"snapkv": ("half of the prompt's tokens, by its last 64 rows", {})},
)
@dataclass(frozen=True, kw_only=True)
class SnapKV(AttentionBudget):
    """Hold the tokens that the last ``window`` rows of the prompt attend to, and those rows' own.

    With A the unedited attention of the ``window`` last rows W on slots j before them, for each KV head

        s_j = mean over its query heads of avgpool_j(mean_{i in W} A_ij),  a pool of ``kernel`` slots, zeros outside

    the W and the slots with the highest s stay, round(keep_ratio n) of n. What is generated stays. Of a prompt
    with fewer than ``window`` / keep_ratio tokens only the end stays: give a smaller ``window``. Counts evicted slots
    (of each KV head).

    Raises:
        OptionError: attention edits in the same layers.
        UnsupportedError: a static cache, no cache.
    """

    by_head: ClassVar[bool] = True
    window: int = option(64, 1, 10**6, "last rows of the prompt that choose", source="kvpress: 64")
    kernel: int = option(5, 1, 101, "neighbours that are pooled, odd", source="kvpress: 5")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise OptionError(f"{self.info.name}.kernel must be odd, got {self.kernel}")

    def look(self, context: LayerContext, weights: Weights, edit: AttentionEdit) -> Tensor:
        seen, recent = rows_seen(context, weights, edit, self.window), newest(context, self.window)
        before = (seen / self.window).masked_fill(recent[:, None], 0)
        pooled = avg_pool1d(before, self.kernel, stride=1, padding=self.kernel // 2)
        return above(self.by_kv_head(context, pooled), recent)
