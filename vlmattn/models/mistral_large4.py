"""Mistral Large 4: a Pixtral tower whose patches are merged, latent attention to the keys that an indexer chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.lighton_ocr import LightOnOcr
from vlmattn.models.registry import register_family


@register_family
class MistralLarge4(LightOnOcr):
    """Every row of an image ends in [IMG_BREAK] or [IMG_END], so an image is several runs."""

    model_types: ClassVar[Mapping[str, str]] = {"mistral_large4": "mistralai/Mistral-Large-4-1T-A52B"}
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("pruning", "decoding"),
        "its indexer keeps keys of its own for every token, which would have to follow dropped tokens and branches;"
        " take an attention edit",
    )
    causal: ClassVar[bool] = False  # rows see the keys that an indexer chooses
    in_tuples: ClassVar[int] = 2
