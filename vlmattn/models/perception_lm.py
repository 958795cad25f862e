"""PerceptionLM: all tiles of an image in one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.base import Family, register_family


class PerceptionLM(Family):
    """Patches are pooled into tokens, so the tower (of timm) is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"perception_lm": "facebook/Perception-LM-8B"}


register_family(PerceptionLM())
