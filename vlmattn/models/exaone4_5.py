"""EXAONE 4.5: the tower of Qwen2.5-VL, a language model whose layers with a window alternate with ones without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.grids import Gridded
from vlmattn.models.registry import register_family


@register_family
class Exaone45(Gridded):
    """Positions are counted in one dimension; layers without a window have none at all."""

    model_types: ClassVar[Mapping[str, str]] = {"exaone4_5": "LGAI-EXAONE/EXAONE-4.5-33B"}
    refused: ClassVar[Mapping[str, str]] = {
        "rotating": "it counts positions itself, the same for all branches; take a rule that changes images, like vcd",
    }
    markers: ClassVar[tuple[str, ...]] = ()
    separated: ClassVar[bool] = True
    counts_padding: ClassVar[bool] = True
