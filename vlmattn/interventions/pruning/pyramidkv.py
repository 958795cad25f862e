"""PyramidKV: as SnapKV, more tokens in lower layers (arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlmattn.anatomy import Anatomy
from vlmattn.interventions.pruning.snapkv import SnapKV
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "pyramidkv",
    paper="arXiv:2406.02069",
    code="kvpress' PyramidKVPress",
    faithful="golden (kept slots, kvpress)",
    parts="keep",
    cost="prefill: a few attention rows a layer; decode: few tokens are held, fewer in upper layers",
    presets={"pyramidkv": ("half of the prompt's tokens over all layers, by its last 64 rows", {})},
)
@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall evenly from the first active layer to the last, their mean keep_ratio n.

    With c = keep_ratio n of n tokens: the last layer holds least = c / ``beta``, the first most = 2c - least. Where
    most > n - ``window``, most = n - ``window`` and least = 2c - most. Where least < ``window`` no pyramid fits, and
    all layers hold round(c), as in kvpress. Counts evicted slots (of each KV head).

    Raises:
        OptionError: attention edits in the same layers.
        UnsupportedError: a static cache, no cache.
    """

    beta: float = option(
        20.0, 1, 10**6, "how many times fewer than the mean the last layer holds", source="kvpress: 20"
    )

    def bind(self, anatomy: Anatomy) -> PyramidKV:
        layers = self.active_layers(anatomy)
        bound = replace(self, layers=",".join(map(str, layers)))
        SnapKV.bind(bound, anatomy)
        return bound

    def budget(self, layer: int, tokens: int) -> int:
        mean, own = self.keep_ratio * tokens, [int(number) for number in self.layers.split(",")]  # once bound
        least = mean / self.beta
        most = 2 * mean - least
        if most >= tokens - self.window:
            most = tokens - self.window
            least = 2 * mean - most
        if not tokens >= most >= least >= self.window or len(own) == 1:
            return SnapKV.budget(self, layer, tokens)
        return round(most - own.index(layer) * (most - least) / (len(own) - 1))
