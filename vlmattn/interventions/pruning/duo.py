"""DuoAttention: some heads keep everything, the others stream (arXiv 2410.10819)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmattn.interventions.pruning.headwise import HeadWise
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "duo",
    paper="arXiv:2410.10819 (ICLR 2025)",
    code="github.com/mit-han-lab/duo-attention (README and settings read, not the attention)",
    faithful="experimental",
    parts="keep",
    cost="decode: streaming heads hold, and read, few tokens; two attention calls a layer",
    presets={"duo": ("half of the KV heads stream; needs a profile of the model's heads", {})},
)
@dataclass(frozen=True, kw_only=True)
class DuoAttention(HeadWise):
    """Retrieval heads keep every token; streaming heads the first ``sinks`` and the last ``recent``.

    A new token of a streaming head sees those, and itself.

    The paper trains a gate for each KV head and takes a quantile of the gates; here the ``share`` of KV heads with the
    highest score of a HeadProfile keeps everything: calibration instead of training. The prompt itself is read with all
    heads whole, where the paper lets heads stream already. Memory is saved, not masked: the heads of a layer live in
    two stores. Counts tokens of heads that were let go after prompts.

    Raises:
        OptionError: no heads and no profile, heads that the model does not have, attention edits in the same layers.
        UnsupportedError: no cache, one that is static, quantized or offloaded, assisted decoding.
    """

    late: ClassVar[bool] = True
    sinks: int = option(64, 1, 10**6, "first tokens that every head keeps", source="released, for LongBench: 64")
    recent: int = option(256, 1, 10**6, "last tokens that every head keeps", source="released, for LongBench: 256")
    share: float = option(
        0.5, 0, 1, "share of KV heads that keep all", source="released: half for GQA, a quarter for MHA"
    )

    def window(self, tokens: int) -> int:
        return self.recent
