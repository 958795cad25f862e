"""Files that lie beside a model: found, written and copied whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from vlmattn.errors import InputError


def beside(source: str, file_name: str) -> Path | None:
    """A file in the folder, or in the downloaded hub repository, that a model came from; None if there is none."""
    if not source:
        return None
    if Path(source).is_dir():
        found = Path(source) / file_name
        return found if found.is_file() else None
    from transformers.utils import cached_file

    cached = cached_file(
        source, file_name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if cached is None else Path(cached)


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file so that it is never seen half-written."""
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(target)


def copy_whole(source: str | os.PathLike[str], target: Path) -> None:
    """Copy a file so that it is never seen half-written; nothing to do if it is the same one.

    Raises:
        InputError: there is no such file.
    """
    if not os.path.isfile(source):
        raise InputError(f"cannot copy {source}, which the recipe names: there is no such file")
    if target.exists() and os.path.samefile(source, target):
        return
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    partial.replace(target)


def file_sha256(path: Path) -> str:
    """The sha256 of a file of any size, in hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
