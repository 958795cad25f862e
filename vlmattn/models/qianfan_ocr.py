"""Qianfan-OCR: all tiles of a page in one run between <img> and </img>, then the page in small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Matched


@register_family
class QianfanOcr(Matched):
    """Patches are shuffled into tokens, so the tower is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"qianfan_ocr": "baidu/Qianfan-OCR"}
    separated: ClassVar[bool] = True
