"""Data on disk: files read with errors that name file and line; images found early and read late."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from vlmattn.errors import InputError, quoted
from vlmattn.pictures import open_picture
from vlmattn.texts import lines_of, parse_json, read_text

_T = TypeVar("_T")


@dataclass(frozen=True)
class ImageFiles:
    """The images of a sample, read when they are called for; the runner finds missing ones before."""

    paths: tuple[Path, ...]

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


@dataclass(frozen=True)
class ImageFolder:
    """The folder that the names of images in question files belong to.

    Attributes:
        path: the folder.
        allow_outside: whether names may lead out of it: by "..", as absolute names, through links.
    """

    path: Path
    allow_outside: bool = False

    def files(self, where: str, names: Iterable[str]) -> ImageFiles:
        """The images of these names; ``where`` is the place of the names, for errors.

        Raises:
            InputError: a name that no file can have, or one that leads outside.
        """
        return ImageFiles(tuple(self.file(where, name) for name in names))

    def file(self, where: str, name: str) -> Path:
        """The path of an image, there or not; raises as ``files``."""
        path = self.path / name
        try:
            if not name.strip():
                raise ValueError("it is empty")
            inside = _real(path).is_relative_to(_real(self.path)) or self.allow_outside
        except (OSError, ValueError) as error:  # ValueError: a NUL in it
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise InputError(f"{where}: {quoted(name)} cannot be the name of an image: {reason}") from None
        if not inside:
            raise InputError(
                f"{where}: the image {quoted(name)} lies outside of {self.path}; give the folder that holds it with"
                " --images, or read it all the same with --allow-outside"
            )
        return path


def _real(path: Path) -> Path:
    """A path without links; what is not there stays as it is written."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise
    return Path(os.path.realpath(path))


@dataclass(frozen=True)
class Item:
    """An object of a question file, or a row of a table. What has another type than asked for raises an ``InputError``.

    Attributes:
        where: its place, "file:line".
        values: by key.
    """

    where: str
    values: Mapping[str, Any]

    def text(self, key: str) -> str:
        """A text."""
        return self._text(key, self.values.get(key), "a text", (str,))

    def key(self, key: str) -> str:
        """An id: a text or a whole number, as text."""
        return self._text(key, self.values.get(key), "a text or a whole number", (str, int))

    def texts(self, key: str) -> list[str]:
        """A list of texts and numbers, as texts."""
        value = self.values.get(key)
        if not isinstance(value, list):
            raise InputError(f"{self.where}: {key} must be a list of texts, got {quoted(value)}")
        return [self._text(key, one, "a list of texts", (str, int, float)) for one in value]

    def yes(self, key: str) -> bool:
        """Whether yes or no stands there."""
        said = str(self.values.get(key)).strip().lower()
        if said not in ("yes", "no"):
            raise InputError(f"{self.where}: {key} must be yes or no, got {quoted(self.values.get(key))}")
        return said == "yes"

    def _text(self, key: str, value: Any, what: str, kinds: tuple[type, ...]) -> str:
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{self.where}: {key} must be {what}, got {quoted(value)}")
        return str(value)


def read_items(path: Path, needs: Sequence[str], what: str) -> list[Item]:
    """The objects of a JSON array or of JSON lines.

    Args:
        needs: keys that every object has.
        what: an object in words, for errors ("a POPE question").

    Raises:
        InputError: the file cannot be read, is cut off, holds none, or something else.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        found = [Item(f"{path}: item {number}", one) for number, one in enumerate(parse_json(text, str(path)), start=1)]
    else:
        lines = enumerate(lines_of(text), start=1)
        found = [Item(f"{path}:{n}", parse_json(line, str(path), n)) for n, line in lines if line.strip()]
    for item in found:
        if not isinstance(item.values, dict) or not set(needs) <= item.values.keys():
            raise InputError(f"{item.where}: {what} needs {', '.join(needs[:-1])} and {needs[-1]}")
    if not found:
        raise InputError(f"{path}: {what} is needed, the file holds none")
    return found


def read_keyed(path: Path, key: str, needs: Sequence[str], what: str) -> dict[str, Item]:
    """The objects of a file as ``read_items`` reads them, by their ``key``.

    Raises:
        InputError: as ``read_items``; an id is there twice, or is neither a text nor a whole number.
    """
    found: dict[str, Item] = {}
    for item in read_items(path, (key, *needs), what):
        name = item.key(key)
        if name in found:
            raise InputError(
                f"{item.where}: {key} {quoted(name)} is there twice (first {found[name].where}); keep one of them"
            )
        found[name] = item
    return found


def first_of_each(items: Iterable[_T], kind: Callable[[_T], str], limit: int | None) -> Iterator[_T]:
    """The first ``limit`` items of each kind; all of them for None."""
    counts: dict[str, int] = {}
    for item in items:
        counts[kind(item)] = counts.get(kind(item), 0) + 1
        if limit is None or counts[kind(item)] <= limit:
            yield item
