"""MiniMax M3: images of any size, attention to the blocks that an indexer chooses in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.grids import Gridded
from vlmattn.models.registry import register_family


@register_family
class MiniMaxM3VL(Gridded):
    """Images stand between markers that the config does not name."""

    model_types: ClassVar[Mapping[str, str]] = {"minimax_m3_vl": "MiniMaxAI/MiniMax-M3"}
    markers: ClassVar[tuple[str, ...]] = ()
    separated: ClassVar[bool] = True
    causal: ClassVar[bool] = False  # rows see the keys that an indexer chooses
