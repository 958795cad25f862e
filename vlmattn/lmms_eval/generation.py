"""A task's generation settings in the words of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

#: What lmms-eval adds to every task that names no stop; its own models drop it too.
_ADDED = "\n\n"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
_LENGTH = 1024  # of tasks that do not say, as in lmms-eval's own models


def options_of(settings: Mapping[str, Any], max_new_tokens: int | None) -> dict[str, Any]:
    """Arguments of ``model.generate``.

    A temperature of 0 is greedy, one above is sampling unless ``do_sample`` says no.

    Args:
        settings: a task's ``generation_kwargs``; those that transformers does not know are named in a warning.
        max_new_tokens: replaces the task's own, if given.
    """
    from transformers import GenerationConfig

    known = GenerationConfig()
    given = {key: value for key, value in settings.items() if key != "until" and value is not None}
    found = {key: value for key, value in given.items() if hasattr(known, key)}
    if unknown := sorted(given.keys() - found.keys()):
        warnings.warn(f"vlmattn: transformers has no generation setting {', '.join(unknown)}; ignored", stacklevel=2)
    heat = found.get("temperature")
    found["do_sample"] = bool(found.get("do_sample", heat)) and heat != 0
    if not found["do_sample"]:
        found = {key: value for key, value in found.items() if key not in _SAMPLING}
    length = max_new_tokens or found.get("max_new_tokens") or _LENGTH
    return {**found, "max_new_tokens": int(length)}


def stops_of(settings: Mapping[str, Any]) -> list[str]:
    """Texts at which an answer ends."""
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop and stop != _ADDED]


def cut(text: str, stops: Sequence[str]) -> str:
    """An answer up to the first stop, without blanks around it."""
    text = text.strip()
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()
