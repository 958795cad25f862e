"""PerceptionLM: an image in small and its tiles, all in one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Matched


@register_family
class PerceptionLM(Matched):
    """Patches are pooled into tokens, so the tower (of timm) is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"perception_lm": "facebook/Perception-LM-8B"}
    ahead: ClassVar[bool] = True
