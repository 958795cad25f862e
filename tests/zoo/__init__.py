"""Tiny random models of every family of vision-language models, from config, with prompts whose images are known."""

from zoo import first, gemma, late, llava, odd, qwen
from zoo.parts import BREAK, CLIP, CLOSE, COLUMN, FAKE, IMG, LAST, OPEN, ROPE, ROW, TEXT, VID, Prompt, Tiny, padded

ZOO: dict[str, Tiny] = {}
for _models in (first, qwen, llava, gemma, late, odd):
    ZOO |= _models.MODELS

__all__ = [
    "BREAK", "CLIP", "CLOSE", "COLUMN", "FAKE", "IMG", "LAST", "OPEN", "ROPE", "ROW", "TEXT", "VID", "ZOO", "Prompt", "Tiny", "padded",
]  # fmt: skip
