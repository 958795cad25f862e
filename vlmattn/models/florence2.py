"""Florence-2: an encoder-decoder, known here to say why it is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family


@register_family
class Florence2(Family):
    model_types: ClassVar[Mapping[str, str]] = {"florence2": "florence-community/Florence-2-large"}
    unsupported: ClassVar[str] = (
        "it is an encoder-decoder: its image tokens are in the encoder, and the decoder reads them by cross-attention,"
        " where no method acts"
    )
