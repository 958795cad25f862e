"""From a task's ``dataset_kwargs`` to a suite: on generated scenes, on published files, on parquet with images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from glob import glob
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError, OptionError, UnknownNameError
from vlmattn.evals import suites
from vlmattn.evals.suites.base import Suite
from vlmattn.evals.suites.files import ImageFolder
from vlmattn.evals.suites.pope import Pope, columns_of
from vlmattn.evals.suites.registry import find_suite
from vlmattn.evals.suites.tables import Table
from vlmattn.evals.suites.world import World

#: Where the files of ``vlmattn_pope`` are, unless the task says: files or patterns, and the folder of their images.
FILES, IMAGES = "VLMATTN_POPE", "VLMATTN_POPE_IMAGES"
_OPTIONS = ("suite", "worlds", "data_files", "images")


def make_suite(**options: Any) -> Suite:
    """The suite of a task.

    Args:
        suite: its name; "pope" if not given.
        worlds: generated scenes, each by the fields of ``World``.
        data_files: POPE's questions: JSON (lines) in the published form, or parquet with ``question``, ``answer``,
            ``image_source`` and ``image``; a path, a pattern, or several. Default: the environment variable
            ``VLMATTN_POPE``.
        images: the folder of the images that JSON names. Default: ``VLMATTN_POPE_IMAGES``.

    Raises:
        UnknownNameError: no such option, suite or field.
        OptionError: files for a suite other than POPE.
        InputError: no files are named, or they cannot be used.
    """
    _refuse_unknown("option of the task", options, _OPTIONS)
    name = options.get("suite", "pope")
    if (worlds := options.get("worlds")) is not None:
        for world in worlds:
            _refuse_unknown("field of a world", world, [field.name for field in fields(World)])
        return suites.make_suite(name, [World(**world) for world in worlds])
    if name != "pope":
        raise OptionError(f"suite '{name}' needs worlds; files are for pope")
    paths = _files(options.get("data_files"))
    if all(path.suffix == ".parquet" for path in paths):
        return _pope_on_parquet(paths)
    images = options.get("images") or os.environ.get(IMAGES)
    if not images:
        raise InputError(f"the folder of the images is needed: dataset_kwargs.images, or {IMAGES}=DIR")
    return Pope.on_files(paths, Path(images))


def _refuse_unknown(kind: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise UnknownNameError(kind, name, known)


def _files(given: Any) -> list[Path]:
    """Files by path, pattern, list of them, or the mapping from splits to them that lmms-eval has elsewhere."""
    if given is None:
        given = [name for name in os.environ.get(FILES, "").split(os.pathsep) if name]
    if isinstance(given, Mapping):
        given = [name for names in given.values() for name in ([names] if isinstance(names, str) else names)]
    patterns = [given] if isinstance(given, str) else list(given)
    if not patterns:
        raise InputError(
            f"POPE's questions are needed: {FILES}=coco_pope_random.json (several: {FILES}='a.json{os.pathsep}b.json',"
            " or a pattern), or dataset_kwargs.data_files in a task of yours"
        )
    found = []
    for pattern in patterns:
        names = sorted(glob(pattern))
        if not names:
            raise InputError(f"no such file: {pattern}")
        found += [Path(name) for name in names]
    return found


def _pope_on_parquet(paths: Sequence[Path]) -> Pope:
    """Questions with their images, as the hub has them. Without a ``category`` each file is a column."""
    from datasets import Dataset

    parts = []
    for path in paths:
        rows = Dataset.from_parquet(str(path))
        if "category" not in rows.column_names:
            rows = rows.add_column("category", [columns_of(paths)[path]] * len(rows))
        parts.append(rows)
    folder = ImageFolder(Path(os.path.commonpath([path.absolute().parent for path in paths])))
    settings = {"table": [path.name for path in paths]}
    return Pope.on_table(Table(find_suite("pope"), ", ".join(map(str, paths)), parts, settings, folder))
