"""Bundled models as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_LARGEST = 6e4  # float16 ends at 65504


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write weights in float16, configuration, processor and chat template; the model is in float16 afterwards.

    Raises:
        ValueError: a weight does not fit in float16.
    """
    for name, weight in model.named_parameters():
        if not float(weight.detach().abs().max()) <= _LARGEST:  # nor if it is not a number
            raise ValueError(f"the weight {name} does not fit in float16")
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
