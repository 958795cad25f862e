"""Qwen2-VL: as Qwen2.5-VL, with a vision tower without windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vlmattn.models.qwen2_5_vl import Qwen25VL
from vlmattn.models.registry import register_family


class Qwen2VL(Qwen25VL):
    """The tower has the patches in the order of the prompt."""

    model_types: ClassVar[Mapping[str, str]] = {"qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct"}

    def in_prompt_order(self, tower: Any, grid: Tensor, tokens: Tensor) -> Tensor:
        return tokens


register_family(Qwen2VL())
