"""Chameleon: 1,024 discrete codes of an image between markers, read as words are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family


@register_family
class Chameleon(Family):
    """The decoder puts the codes in the place of the image tokens itself."""

    model_types: ClassVar[Mapping[str, str]] = {"chameleon": "facebook/chameleon-7b"}
    even: ClassVar[bool] = True
    square: ClassVar[bool] = True

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return model.model  # type: ignore[no-any-return]
