"""Model-specific patchers: one small file per family."""

from vlmattn.models import (  # noqa: F401  (they register themselves)
    aria,
    aya_vision,
    blip2,
    deepseek_vl,
    emu3,
    fast_vlm,
    florence2,
    gemma3,
    gemma3n,
    glm4v,
    idefics2,
    idefics3,
    internvl,
    janus,
    kimi_k25,
    lfm2_vl,
    llama4,
    llava,
    llava_next,
    llava_onevision,
    mistral3,
    mllama,
    ovis2,
    paligemma,
    perception_lm,
    qwen2_5_vl,
    qwen2_vl,
    video_llava,
    vipllava,
)
from vlmattn.models.base import KINDS, Family, marker_ids_of
from vlmattn.models.generic import Generic
from vlmattn.models.image_layout import WHOLE, Box, Piece
from vlmattn.models.inputs import OF_IMAGES, OF_TOKENS
from vlmattn.models.registry import find_family, register_family, registered, supported_families
from vlmattn.models.turns import Turns

__all__ = [
    "KINDS",
    "OF_IMAGES",
    "OF_TOKENS",
    "WHOLE",
    "Box",
    "Family",
    "Generic",
    "Piece",
    "Turns",
    "find_family",
    "marker_ids_of",
    "register_family",
    "registered",
    "supported_families",
]
