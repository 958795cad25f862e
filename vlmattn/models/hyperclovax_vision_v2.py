"""HyperCLOVA X Vision 2: the tower of Qwen2.5-VL with a projector, positions of one dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.grids import Gridded
from vlmattn.models.registry import register_family


@register_family
class HyperClovaXVision2(Gridded):
    """Images stand between markers that the config does not name."""

    model_types: ClassVar[Mapping[str, str]] = {"hyperclovax_vision_v2": "naver-hyperclovax/HyperCLOVAX-SEED-Think-32B"}
    markers: ClassVar[tuple[str, ...]] = ()
    separated: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {
        "rotating": "it counts positions itself, the same for all branches; take a rule that changes images, like vcd",
    }
    counts_padding: ClassVar[bool] = True
