"""Files whose objects have an id of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmattn.errors import InputError, quoted
from vlmattn.evals.suites.files import Item, read_items


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
