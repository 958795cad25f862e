"""SmolVLM and SmolVLM2: as Idefics3, with fewer tokens; frames of a video count as images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.idefics3 import Idefics3
from vlmattn.models.registry import register_family


class SmolVLM(Idefics3):
    model_types: ClassVar[Mapping[str, str]] = {"smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct"}


register_family(SmolVLM())
