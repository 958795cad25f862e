"""Errors with a remedy. Every message is one line that says what was wrong, what is allowed and what to do next."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Iterable

TORCHVISION_REMEDY = (
    "torchvision is installed but does not load beside this torch, and then transformers cannot load image models;"
    " run: pip uninstall -y torchvision timm   (nothing here needs them)"
)


class VlmattnError(Exception):
    """Base class of all errors raised on purpose."""


class OptionError(VlmattnError, ValueError):
    """An option has a value it may not have."""


_FEW = 12  # names that fit a line


class UnknownNameError(VlmattnError, KeyError):
    """A preset, method or suite that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        few = known if len(known) <= _FEW else [*known[:_FEW], f"and {len(known) - _FEW} more"]
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(few)}"
        self.message = f"unknown {kind} '{name}'; {hint}"
        super().__init__(self.message)

    def __str__(self) -> str:  # KeyError would show the repr
        return self.message


class UnsupportedError(VlmattnError):
    """A model, option or composition this version cannot run correctly."""


class StateError(VlmattnError, RuntimeError):
    """A call in the wrong order: wrapping twice, a cache from elsewhere."""


class InputError(VlmattnError, ValueError):
    """Inputs, files or images that cannot be used."""


def torchvision_trouble() -> str | None:
    """The remedy if torchvision is installed but broken, else None."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception:  # a broken binary raises anything
        return TORCHVISION_REMEDY
    return None
