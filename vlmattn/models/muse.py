"""Muse Glimmer and Muse Spark: images of any size, layers with windows and without positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from transformers import PreTrainedModel

from vlmattn.models.grids import Gridded
from vlmattn.models.registry import register_family


@register_family
class Muse(Gridded):
    """Images stand between markers that the config does not name."""

    model_types: ClassVar[Mapping[str, str]] = {
        "muse_glimmer": "meta-models/Muse-Glimmer-30B",
        "muse_spark": "meta-models/Muse-Spark-Open-816B-A42B",
    }
    markers: ClassVar[tuple[str, ...]] = ()
    separated: ClassVar[bool] = True

    def merge(self, model: PreTrainedModel) -> int:
        return int(model.config.vision_config.merge_size)
