"""Tiny random models of every family of vision-language models, from config, with prompts whose images are known."""

import pytest
import transformers

from zoo import first, gemma, late, llava, odd, qwen
from zoo.parts import BREAK, CLIP, CLOSE, COLUMN, FAKE, IMG, LAST, OPEN, ROPE, ROW, TEXT, VID, Prompt, Tiny, padded

EVERY: dict[str, Tiny] = first.MODELS | qwen.MODELS | llava.MODELS | gemma.MODELS | late.MODELS | odd.MODELS


class Zoo(dict[str, Tiny]):
    """The models that the installed transformers has; a test that asks for a newer one by name is skipped."""

    def __missing__(self, name: str) -> Tiny:
        if name in EVERY:
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        raise KeyError(name)


def _is_there(tiny: Tiny) -> bool:
    try:
        tiny.make()
    except AttributeError as error:
        if str(error).startswith("module transformers has no attribute"):
            return False
        raise
    return True


ZOO = Zoo({name: tiny for name, tiny in EVERY.items() if _is_there(tiny)})

__all__ = [
    "BREAK", "CLIP", "CLOSE", "COLUMN", "EVERY", "FAKE", "IMG", "LAST", "OPEN", "ROPE", "ROW", "TEXT", "VID", "ZOO", "Prompt", "Tiny",
    "Zoo", "padded",
]  # fmt: skip
