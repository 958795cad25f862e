"""Text and JSON from files: one reader with one manner for everything that users give."""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError

_MOST = 2**30  # bytes of a text file; every published question file is far below
_ENCODINGS = (  # marks at the beginning of a file, the longer before those that they begin with
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_bytes(path: str | os.PathLike[str], most: int = _MOST) -> bytes:
    """A regular file of at most ``most`` bytes; a pipe or a device would hang or never end.

    Raises:
        InputError: there is no such file, it is another kind of file, or it is too large or cannot be read.
    """
    try:
        # a pipe without a writer would block here, so it is opened without waiting
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"cannot read {_name(path)}: {_reason(error)}") from None
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise InputError(f"cannot read {_name(path)}: not a regular file")
        if about.st_size > most:
            raise InputError(f"cannot read {_name(path)}: {about.st_size} bytes, and at most {most} are read")
        try:
            return file.read()
        except OSError as error:
            raise InputError(f"cannot read {_name(path)}: {_reason(error)}") from None


def read_text(path: str | os.PathLike[str], most: int = _MOST) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 or UTF-32 with one.

    Raises:
        InputError: it cannot be read, or is not text.
    """
    content = read_bytes(path, most)
    encoding = next((name for mark, name in _ENCODINGS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        raise InputError(f"{_name(path)}: not a text file in UTF-8") from None
    if "\0" in text:
        raise InputError(f"{_name(path)}: not a text file (it holds a NUL)")
    return text


def lines_of(text: str) -> list[str]:
    r"""The lines of a text: only ``\n``, ``\r\n`` and a lone ``\r`` end one, never a Unicode separator within a sentence."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def parse_json(text: str, where: str, line: int | None = None) -> Any:
    """A JSON value; ``where`` and ``line`` name it in errors.

    Raises:
        InputError: not JSON, a key twice in one object, a number or a depth that cannot be read, half of a surrogate pair.
    """
    place = where if line is None else f"{where}:{line}"
    try:
        value = json.loads(text, object_pairs_hook=_object)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be written again
    except json.JSONDecodeError as error:
        at = f"{where}:{error.lineno if line is None else line}"
        raise InputError(f"{at}: not valid JSON ({error.msg})") from None
    except _TwiceError as error:
        raise InputError(f"{place}: the key '{_short(str(error))}' stands twice in one object; keep one") from None
    except UnicodeEncodeError:
        raise InputError(f"{place}: not valid text (half of a surrogate pair)") from None
    except RecursionError:
        raise InputError(f"{place}: JSON that is nested too deeply") from None
    except ValueError:
        raise InputError(f"{place}: a number with too many digits") from None
    return value


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file; raises as ``read_text`` and ``parse_json``."""
    return parse_json(read_text(path), _name(path))


def read_json_lines(path: str | os.PathLike[str]) -> list[tuple[int, Any]]:
    """The values of a file of JSON lines with their line numbers; empty lines are passed over.

    Raises:
        InputError: as ``read_text`` and ``parse_json``, by file and line.
    """
    lines = enumerate(lines_of(read_text(path)), start=1)
    return [(number, parse_json(line, _name(path), number)) for number, line in lines if line.strip()]


class _TwiceError(ValueError):
    """A key that stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(key)
        found[key] = value
    return found


def _short(text: str, most: int = 80) -> str:
    """Text of a user in an error: on one line, of bounded length."""
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return line if len(line) <= most else line[: most - 3] + "..."


def _name(path: str | os.PathLike[str]) -> str:
    return _short(str(Path(path)), 200)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
