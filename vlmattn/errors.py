"""Errors with a remedy. Every message is one line that says what was wrong, what is allowed and what to do next."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import reprlib
from collections.abc import Iterable
from typing import Any

TORCHVISION_REMEDY = (
    "torchvision is installed but does not load beside this torch, and then transformers cannot load image models;"
    " run: pip uninstall -y torchvision timm   (nothing here needs them)"
)


_MESSAGE = 1_000  # letters of a message, whatever it quotes
_QUOTED = 80  # letters of a name or a value that a message quotes


def one_line(text: str, most: int = _MESSAGE) -> str:
    """Text that may come from a user on one line of at most ``most`` letters; the middle is left out of longer ones.

    Line breaks become spaces; control characters and halves of surrogate pairs, which terminals and files cannot take,
    become U+FFFD.
    """
    if len(text) > most:
        text = text[: most - most // 3 - 5] + " ... " + text[len(text) - most // 3 :]
    text = re.sub(r"\s*[^\S ]\s*", " ", text)
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def quoted(value: Any, most: int = _QUOTED) -> str:
    """A value of a user in a message: its ``repr`` on one line of at most ``most`` letters."""
    return one_line(_REPR.repr(value), most)


class _Repr(reprlib.Repr):
    """Bounded in time and memory, for values of every size and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _QUOTED
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 12, 12, 6

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write more than 4,300 digits
        return repr(value) if value.bit_length() < 1_000 else f"a number of {value.bit_length()} bits"


_REPR = _Repr()


class VlmattnError(Exception):
    """Base class of all errors raised on purpose; the message is one line of bounded length, whatever it quotes."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class OptionError(VlmattnError, ValueError):
    """An option has a value it may not have."""


_FEW = 12  # names that fit a line


class UnknownNameError(VlmattnError, KeyError):
    """A preset, method or suite that does not exist. ``note``: what else to say."""

    def __init__(self, kind: str, name: str, known: Iterable[str], note: str = "") -> None:
        known, name = sorted(known), one_line(name, _QUOTED)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        few = known if len(known) <= _FEW else [*known[:_FEW], f"and {len(known) - _FEW} more"]
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(few)}"
        super().__init__(f"unknown {kind} '{name}'; {hint}{note and f'; {note}'}")

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0])


class UnsupportedError(VlmattnError):
    """A model, option or composition this version cannot run correctly."""


class StateError(VlmattnError, RuntimeError):
    """A call in the wrong order: wrapping twice, a cache from elsewhere."""


class InputError(VlmattnError, ValueError):
    """Inputs, files or images that cannot be used."""


class FileError(InputError, OSError):
    """What the system says of a file: it is not there, the disk is full, the folder cannot be written."""


def torchvision_trouble() -> str | None:
    """The remedy if torchvision is installed but broken, else None."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception:  # a broken binary raises anything
        return TORCHVISION_REMEDY
    return None
