"""Hunyuan 4: images of any size with a token behind each row, latent attention to the keys that an indexer chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from vlmattn.models.grids import Spatial
from vlmattn.models.mistral_large4 import INDEXED
from vlmattn.models.reasons import STREAMS
from vlmattn.models.registry import register_family


@register_family
class HYV4VL(Spatial):
    """The residual stream is several streams; methods that look at hidden states see their mean (ours)."""

    model_types: ClassVar[Mapping[str, str]] = {"hy_v4_vl": "tencent/Hy4"}
    markers: ClassVar[tuple[str, ...]] = ()
    separated: ClassVar[bool] = True
    behind: ClassVar[int] = 1
    refused: ClassVar[Mapping[str, str]] = {**INDEXED, "steering": STREAMS}
    in_tuples: ClassVar[int] = 2
    causal: ClassVar[bool] = False  # rows see the keys that an indexer chooses

    def residual(self, hidden: Tensor) -> Tensor:
        return hidden.mean(2) if hidden.ndim == 4 else hidden
