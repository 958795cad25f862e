"""DuoAttention: some heads keep everything, the others stream (arXiv 2410.10819)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from vlmattn.anatomy import Anatomy
from vlmattn.errors import InputError, OptionError
from vlmattn.interventions.pruning.headwise import HeadWise
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.texts import read_text


@register(
    "duo",
    paper="arXiv:2410.10819 (ICLR 2025)",
    code="github.com/mit-han-lab/duo-attention (README and settings read, not the attention)",
    faithful="experimental",
    parts="keep",
    cost="decode: streaming heads hold, and read, few tokens; two attention calls a layer",
    presets={"duo": ("half of the KV heads stream; needs a profile of the model's heads, or released gates", {})},
)
@dataclass(frozen=True, kw_only=True)
class DuoAttention(HeadWise):
    """Retrieval heads keep every token; streaming heads the first ``sinks`` and the last ``recent``.

    A new token of a streaming head sees those, and itself.

    The paper trains a gate for each KV head; ``gates`` names such a table, as released for six models
    (``full_attention_heads.tsv``: a line for each layer, a number for each KV head): the heads whose gate is at least
    the 1 - ``share`` quantile keep everything. Without one, the ``share`` of KV heads with the highest score of a
    HeadProfile does: calibration instead of training. The prompt itself is read with all heads whole, where the paper
    lets heads stream already. Memory is saved, not masked: the heads of a layer live in two stores. Counts tokens of
    heads that were let go after prompts.

    Raises:
        InputError: no such table of gates, or none for this model.
        OptionError: no heads and no profile, heads that the model does not have, attention edits in the same layers.
        UnsupportedError: no cache, one that is static, quantized or offloaded, assisted decoding.
    """

    late: ClassVar[bool] = True
    files: ClassVar[Mapping[str, str]] = {**HeadWise.files, "gates": "full_attention_heads.tsv"}
    sinks: int = option(64, 1, 10**6, "first tokens that every head keeps", source="released, for LongBench: 64")
    recent: int = option(256, 1, 10**6, "last tokens that every head keeps", source="released, for LongBench: 256")
    share: float = option(
        0.5, 0, 1, "share of KV heads that keep all", source="released: half for GQA, a quarter for MHA"
    )

    gates: str = option("", about="table of trained gates (.tsv) by which heads keep everything")

    def bind(self, anatomy: Anatomy) -> HeadWise:
        if not self.gates or self.heads:
            return HeadWise.bind(self, anatomy)
        table = torch.tensor(_read_gates(self.gates, anatomy)).clamp(0, 1)
        full = table >= table.quantile(1 - self.share)
        own = [place for place in full.nonzero().tolist() if place[0] in self.active_layers(anatomy)]
        if not own:
            raise OptionError(
                f"duo.gates: no KV head of the layers {self.layers} keeps everything; give a larger share"
            )
        return HeadWise.bind(replace(self, heads=",".join(f"{layer}.{head}" for layer, head in own)), anatomy)

    def window(self, tokens: int) -> int:
        return self.recent


def _read_gates(path: str, anatomy: Anatomy) -> list[list[float]]:
    """Gates of each layer and KV head.

    Raises:
        InputError: no such table, or none for this model.
    """
    lines = read_text(Path(path)).splitlines()
    try:
        table = [[float(word) for word in line.split("\t")] for line in lines if line.strip()]
    except ValueError as error:
        raise InputError(f"{path}: not a table of gates: {error}") from None
    sizes = {len(row) for row in table}
    if len(table) != anatomy.layers or sizes != {anatomy.kv_heads}:
        raise InputError(
            f"{path}: gates of {len(table)} layers of {' or '.join(map(str, sorted(sizes)))} KV heads; the model has"
            f" {anatomy.layers} of {anatomy.kv_heads}"
        )
    return table
