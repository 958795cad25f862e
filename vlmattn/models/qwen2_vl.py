"""Qwen2-VL and Qwen3-VL: as Qwen2.5-VL, with a vision tower without windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vlmattn.models.qwen2_5_vl import Qwen25VL
from vlmattn.models.reasons import HYBRID, STREAMS
from vlmattn.models.registry import register_family


@register_family
class Qwen2VL(Qwen25VL):
    """The tower has the patches in the order of the prompt.

    Every frame of a video of Qwen3-VL has markers and a timestamp of its own, so it counts as an image. The timestamps
    are text: they stay where a branch drops the image.
    """

    model_types: ClassVar[Mapping[str, str]] = {
        "qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct",
        "qwen3_vl": "Qwen/Qwen3-VL-8B-Instruct",
        "qwen3_vl_moe": "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "cosmos3_omni": "nvidia/Cosmos3-Nano",
    }

    def in_prompt_order(self, tower: Any, grid: Tensor, tokens: Tensor) -> Tensor:
        return tokens


@register_family
class Qwen35(Qwen2VL):
    """Most layers have a gated delta rule instead of attention."""

    model_types: ClassVar[Mapping[str, str]] = {
        "qwen3_5": "Qwen/Qwen3.5-27B",
        "qwen3_5_moe": "Qwen/Qwen3.5-35B-A3B",
    }
    refused: ClassVar[Mapping[str, str]] = HYBRID


@register_family
class Qwen4Exp(Qwen35):
    """Most layers have a gated delta rule instead of attention, the others an indexer."""

    model_types: ClassVar[Mapping[str, str]] = {"qwen4_exp": "Qwen/Qwen4-Exp"}
    causal: ClassVar[bool] = False  # rows see the keys that an indexer chooses
    refused: ClassVar[Mapping[str, str]] = {
        **HYBRID,
        "pruning": "its indexer keeps keys of its own for every token; take an attention edit",
        "decoding": "its indexer keeps keys of its own for every token, which would have to follow branches; take an"
        " attention edit",
        "steering": STREAMS,
    }
