"""GOT-OCR 2 and PP-Chart2Table: a page of 256 tokens; several pages or crops lie in one run between markers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Matched


@register_family
class GotOcr2(Matched):
    """The tower ends in convolutions, so it is not looked at. Pages that are read together count as one image."""

    model_types: ClassVar[Mapping[str, str]] = {
        "got_ocr2": "stepfun-ai/GOT-OCR-2.0-hf",
        "pp_chart2table": "PaddlePaddle/PP-Chart2Table_safetensors",
    }
    separated: ClassVar[bool] = True
