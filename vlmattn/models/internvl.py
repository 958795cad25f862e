"""InternVL 2.5, 3 and 3.5 in their Hugging Face form: all tiles of an image in one run between <img> and </img>."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Matched


@register_family
class InternVL(Matched):
    """Patches are shuffled into tokens, so the tower is not looked at. Frames of a video count as images."""

    model_types: ClassVar[Mapping[str, str]] = {"internvl": "OpenGVLab/InternVL3-8B-hf"}
    separated: ClassVar[bool] = True
