"""Data on disk: files read with errors that name file and line; images found early and read late."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from vlmattn.errors import InputError
from vlmattn.pictures import open_picture

_T = TypeVar("_T")


@dataclass(frozen=True)
class ImageFiles:
    """The images of a sample, read when they are called for. Those that are not there are found before a run, by the runner."""

    paths: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path, names: Iterable[str]) -> ImageFiles:
        return cls(tuple(folder / name for name in names))

    def __call__(self) -> list[Image.Image]:
        """
        Raises:
            InputError: an image is missing or damaged.
        """
        return [read_image(path) for path in self.paths]


def read_image(path: Path) -> Image.Image:
    """The picture in a file, as ``open_picture``.

    Raises:
        InputError: it is not there, or cannot be read.
    """
    if not os.path.exists(path):  # False for a name that no file can have
        raise InputError(f"image not found: {path}")
    return open_picture(path)


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file") from None


def read_items(path: Path, needs: Sequence[str], what: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON array or of JSON lines, each with its place ("file:line") for errors.

    Args:
        needs: keys that every object has.
        what: an object in words, for errors ("a POPE question").

    Raises:
        InputError: the file cannot be read, is cut off, holds none, or something else.
    """
    text = read_text(path)
    found: list[tuple[str, Any]] = []
    if text.lstrip().startswith("["):
        try:
            found = [(f"{path}: item {number}", item) for number, item in enumerate(json.loads(text), start=1)]
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    else:
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    found.append((f"{path}:{number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}:{number}: not valid JSON ({error.msg})") from None
    for where, item in found:
        if not isinstance(item, dict) or not set(needs) <= item.keys():
            raise InputError(f"{where}: {what} needs {', '.join(needs[:-1])} and {needs[-1]}")
    if not found:
        raise InputError(f"{path}: {what} is needed, the file holds none")
    return found


def first_of_each(items: Iterable[_T], kind: Callable[[_T], str], limit: int | None) -> Iterator[_T]:
    """The first ``limit`` items of each kind; all of them for None."""
    counts: dict[str, int] = {}
    for item in items:
        counts[kind(item)] = counts.get(kind(item), 0) + 1
        if limit is None or counts[kind(item)] <= limit:
            yield item
