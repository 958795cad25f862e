"""Cosmos 3 Edge: images of any size between markers, M-RoPE positions, a tower without rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.grids import Spatial
from vlmattn.models.registry import register_family


@register_family
class Cosmos3Edge(Spatial):
    """Patches are merged by a projector, so the tower is not looked at."""

    model_types: ClassVar[Mapping[str, str]] = {"cosmos3_edge": "nvidia/Cosmos3-Edge"}
    text_axis: ClassVar[bool] = False
