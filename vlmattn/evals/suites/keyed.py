"""Files whose objects have an id of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError
from vlmattn.evals.suites.files import read_items


def read_keyed(path: Path, key: str, needs: Sequence[str], what: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The objects of a file as ``read_items`` reads them, with their places, by their ``key``.

    Raises:
        InputError: as ``read_items``; an id is there twice.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, item in read_items(path, (key, *needs), what):
        name = str(item[key])
        if name in found:
            raise InputError(f"{where}: {key} '{name}' is there twice (first {found[name][0]}); keep one of them")
        found[name] = (where, item)
    return found
