"""Files that lie beside a model: found, written and copied whole."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vlmattn.errors import FileError, InputError, one_line

_REMEDIES = {
    errno.ENOSPC: "make room, or give a place on another disk",
    getattr(errno, "EDQUOT", -1): "make room, or give a place on another disk",
    errno.EROFS: "give a place that can be written",
    errno.EACCES: "change its permissions, or give another place",
    errno.EPERM: "change its permissions, or give another place",
    errno.ENAMETOOLONG: "give a shorter name",
}


def beside(source: str, file_name: str) -> Path | None:
    """A file in the folder, or in the downloaded hub repository, that a model came from; None if there is none."""
    if not source:
        return None
    if Path(source).is_dir():
        found = Path(source) / file_name
        return found if found.is_file() else None
    from vlmattn.compat import file_beside  # transformers takes a while, and most files are beside nothing

    cached = file_beside(source, file_name)
    return None if cached is None else Path(cached)


def path_text(path: str | os.PathLike[str]) -> str:
    """A path in a message."""
    return one_line(os.fspath(path), 200)


def reason(error: OSError) -> str:
    """Why a file could not be used, and what helps, in words."""
    said = error.strerror or str(error) or type(error).__name__
    return f"{said}; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else said


@contextmanager
def file_errors(doing: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system says of a file becomes a ``FileError``: "cannot read FILE: why".

    Args:
        doing: what is done with the file, a verb.
    """
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError
    except ValueError:  # also half of a surrogate pair
        raise FileError(f"cannot {doing} {path_text(path)}: no file can have this name") from None
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot {doing} {path_text(path)}: {reason(error)}") from error
    except SafetensorError as error:  # what the system says of files of tensors, and of damaged ones
        raise FileError(f"cannot {doing} {path_text(path)}: {error}") from error


@contextmanager
def reading(path: str | os.PathLike[str], what: str = "") -> Iterator[None]:
    """As ``file_errors``, for libraries that open files by name: a pipe or a device, on which they hang, is an error.

    Args:
        what: the file in words, for errors ("the directions").
    """
    doing = f"read {what}".strip()
    with file_errors(doing, path):
        check_regular(os.stat(path), doing, path)
        yield


def check_regular(found: os.stat_result, doing: str, path: str | os.PathLike[str]) -> None:
    """Raise ``FileError`` for what is no file with bytes in it."""
    if not stat.S_ISREG(found.st_mode):
        kind = "it is a folder" if stat.S_ISDIR(found.st_mode) else "it is a pipe or a device; give a file"
        raise FileError(f"cannot {doing} {path_text(path)}: {kind}")


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder, made with those above it if it is not there.

    Raises:
        FileError: it cannot be made.
    """
    with file_errors("make the folder", folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


@contextmanager
def written_whole(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write a file or folder under, which gets its own name at the end; on an error nothing is left.

    Raises:
        FileError: the disk is full, the place cannot be written, and whatever else the system says.
    """
    target = Path(target)
    partial = target.with_name(target.name + ".partial")
    try:
        with file_errors("write", target):
            yield partial
            partial.replace(target)
    except BaseException:
        with suppress(OSError, ValueError):
            shutil.rmtree(partial) if partial.is_dir() and not partial.is_symlink() else partial.unlink(missing_ok=True)
        raise


def write_whole(target: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file so that it is never seen half-written; halves of surrogate pairs are written as ``?``.

    Raises:
        FileError: it cannot be written; nothing is left of it.
    """
    with written_whole(target) as partial:
        partial.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


def copy_whole(source: str | os.PathLike[str], target: Path) -> None:
    """Copy a file so that it is never seen half-written; nothing to do if it is the same one.

    Raises:
        InputError: there is no such file.
        FileError: it cannot be copied.
    """
    if not os.path.isfile(source):
        raise InputError(f"cannot copy {path_text(source)}, which the recipe names: there is no such file")
    if target.exists() and os.path.samefile(source, target):
        return
    with written_whole(target) as partial:
        shutil.copyfile(source, partial)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with a header of all their columns; a column that a row does not have stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def file_sha256(path: Path) -> str:
    """The sha256 of a file of any size, in hex digits.

    Raises:
        FileError: it is no regular file, or cannot be read.
    """
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
