"""The bundled model: a small LLaVA trained on generated scenes, and how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmattn.errors import UnknownNameError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

FOLDER = Path(__file__).parent / "tiny-scenes"


def load(name: str = "embedded", **kwargs: Any) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The bundled model and its processor, offline.

    Args:
        name: "embedded" (the only bundled model of this version).
        kwargs: for ``from_pretrained``; the default dtype is float32 (the file holds float16).

    Raises:
        UnknownNameError: another name.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    if name != "embedded":
        raise UnknownNameError("bundled model", name, ["embedded"])
    model = LlavaForConditionalGeneration.from_pretrained(FOLDER, **{"dtype": "float32", **kwargs})
    return model.eval(), AutoProcessor.from_pretrained(FOLDER)
