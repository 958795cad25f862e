"""PaddleOCR-VL: a page or a cut of it between markers, M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.grids import Spatial
from vlmattn.models.registry import register_family


@register_family
class PaddleOCRVL(Spatial):
    """Patches are merged by a projector, so the tower is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"paddleocr_vl": "PaddlePaddle/PaddleOCR-VL"}
