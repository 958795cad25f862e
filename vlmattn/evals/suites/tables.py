"""Tables of the Hugging Face hub, or such parquet files in a folder; pictures stay on disk until they are shown.

Needs the ``datasets`` library: pip install "vlmattn[hub]".
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmattn.errors import InputError
from vlmattn.evals.suites.files import ImageFolder, Item
from vlmattn.evals.suites.registry import Form, SuiteInfo, all_suites
from vlmattn.pictures import decode_picture, open_picture

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SPLITS = ("val", "validation", "image", "test")  # those with answers first; "image" is HallusionBench's


@dataclass(frozen=True)
class RowPictures:
    """The pictures of one row, decoded when they are called for."""

    data: Any  # a part of the table, picture columns only, as it is stored (Arrow)
    index: int
    where: str
    folder: ImageFolder | None  # where files may lie that are named in place of a picture

    def __call__(self) -> list[Image.Image]:
        """
        Raises:
            InputError: a picture is damaged.
        """
        cells = self.data[self.index : self.index + 1].to_pydict().values()
        listed = [
            item for (cell,) in cells for item in (cell if isinstance(cell, list) else [cell]) if item is not None
        ]
        try:
            return [self._picture(item) for item in listed]
        except InputError as error:
            raise InputError(f"{self.where}: cannot read the pictures of this row: {error}") from None

    def _picture(self, item: Any) -> Image.Image:
        """A picture from a cell as it is stored: its bytes, bytes with a name, or the name of a file."""
        content, file = (item.get("bytes"), item.get("path")) if isinstance(item, dict) else (item, None)
        if isinstance(content, bytes):
            return decode_picture(content)
        if self.folder is None or not file or "://" in file:
            raise InputError("the table holds no picture here, at most the name of one")
        try:
            return open_picture(self.folder.file("the image", os.path.abspath(file)))
        except InputError as error:
            raise InputError(f"the table holds no picture here, only a name: {error}") from None


@dataclass(frozen=True)
class Row(Item):
    """A row of a table: its columns but the pictures, and these.

    Attributes:
        pictures: read them.
        count: how many there are.
    """

    pictures: RowPictures
    count: int


class Table:
    """A published table that a suite can read.

    Args:
        suite: which one reads it.
        name: of the table, for errors.
        parts: datasets with the same columns.
        settings: what is written with every result.
        folder: where files may lie that a table names in place of holding their pictures; None for nowhere.

    Raises:
        InputError: columns are missing; the error names them, and the suite whose columns are there.
    """

    def __init__(
        self,
        suite: SuiteInfo,
        name: str,
        parts: Sequence[Any],
        settings: Mapping[str, Any],
        folder: ImageFolder | None = None,
    ) -> None:
        self.name, self.settings, self._parts, self._folder = name, dict(settings), parts, folder
        self._form = _form(suite, name, parts[0].column_names)

    def __iter__(self) -> Iterator[Row]:
        start = 0
        for part in self._parts:
            texts = part.select_columns([c for c in part.column_names if c in (*self._form.needs, *self._form.more)])
            pictures = part.select_columns([c for c in self._form.pictures if c in part.column_names])
            stored = pictures.with_format("arrow")
            for index, (values, count) in enumerate(zip(texts, _counts(pictures, self.name), strict=True)):
                where = f"{self.name}: row {start + index}"
                yield Row(where, values, RowPictures(stored, index, where, self._folder), count)
            start += len(part)


def is_table(path: Path) -> bool:
    """Whether a path is a folder of parquet files, or no file but a name of the hub; maybe with ``:config``."""
    source = Path(_named(path)[0])
    if source.is_dir():
        return next(source.rglob("*.parquet"), None) is not None
    is_file = source.exists() or source.suffix in (".json", ".jsonl")
    return not is_file and _HUB_NAME.fullmatch(source.as_posix()) is not None


def load_table(suite: SuiteInfo, path: Path, allow_outside: bool = False) -> Table:
    """The table that ``path`` names; from the hub only the files of one split are fetched.

    Configuration: the one behind the colon, or the only one, or ``default``; or all, where the suite says so. Split:
        the first of val, validation, image and test that there is, otherwise all.

    Raises:
        InputError: ``datasets`` is missing, there is no such table or no way to the hub, or it has other columns.
    """
    datasets = _library()
    name, config = _named(path)
    local = Path(name).exists()
    try:
        configs = _configs(suite, name, config, datasets.get_dataset_config_names(name))
        found = [_parts(datasets, name, config) for config in configs]
    except InputError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if local:
            raise InputError(f"cannot read the table in {name}: {reason}") from None
        raise InputError(
            f"there is no file or folder '{name}' here, and the table could not be fetched from the hub: {reason};"
            f" without a network, fetch it elsewhere (hf download {name} --repo-type dataset --local-dir DIR)"
            " and name DIR"
        ) from None
    settings = {
        "table": Path(name).name if local else name,
        "config": configs,
        "split": [split for split, _, _ in found[0]],
        "revision": sorted({revision for parts in found for _, _, revision in parts}),
    }
    folder = ImageFolder(Path(name), allow_outside) if local else None
    return Table(suite, name, [part for parts in found for _, part, _ in parts], settings, folder)


def _named(path: Path) -> tuple[str, str]:
    """A source and the configuration behind its colon; a path that is there has none."""
    name, _, config = path.as_posix().partition(":")
    return (path.as_posix(), "") if path.exists() else (name, config)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError('tables of the hub need the datasets library: pip install "vlmattn[hub]"') from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _configs(suite: SuiteInfo, name: str, config: str, known: Sequence[str]) -> list[str]:
    if config and config not in known:
        raise InputError(f"{name}: no configuration '{config}'; there are {', '.join(known)}")
    if config:
        return [config]
    if len(known) == 1 or suite.all_configs:
        return list(known)
    if "default" in known:
        return ["default"]
    raise InputError(
        f"{name}: add a configuration, --data {suite.name}={name}:{known[0]}; there are {', '.join(known)}"
    )


def _parts(datasets: Any, name: str, config: str) -> list[tuple[str, Any, str]]:
    """Splits of a configuration with data and revisions; ``load_dataset`` would fetch all (VQAv2: 45 GB)."""
    builder = datasets.load_dataset_builder(name, config)
    files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
    if not files or not all(file.endswith(".parquet") for paths in files.values() for file in paths):
        raise InputError(f"{name}: not a table of parquet files")
    chosen = next(([split] for split in _SPLITS if split in files), list(files))
    found = []
    for split in chosen:
        data = datasets.load_dataset(
            "parquet", data_files={split: files[split]}, split=split, features=builder.info.features
        )
        commit = re.search(r"@([0-9a-f]{40})/", files[split][0])  # hub files are named with theirs
        found.append((split, data, commit.group(1) if commit else str(data._fingerprint)))
    return found


def _form(suite: SuiteInfo, name: str, columns: Sequence[str]) -> Form:
    fitting = next((form for form in suite.forms if not form.missing(columns)), None)
    if fitting is not None:
        return fitting
    nearest = min(suite.forms, key=lambda form: len(form.missing(columns)))
    others = [
        f"{form.name}: --data {each.name}={name}"
        for each in all_suites().values()
        for form in each.forms
        if not form.missing(columns)
    ]
    hint = f"; they are those of {' or '.join(others)}" if others else ""
    raise InputError(
        f"{name}: for suite {suite.name} ({' or '.join(form.name for form in suite.forms)}) the columns"
        f" {', '.join(nearest.missing(columns))} are missing; there are {', '.join(columns)}{hint}"
    )


def _counts(pictures: Any, where: str) -> Iterator[int]:
    """How many pictures each row has, without decoding any.

    Raises:
        InputError: a column without pictures.
    """
    for batch in pictures.with_format("arrow").iter(batch_size=256):
        counts = [0] * batch.num_rows
        for name, column in zip(batch.column_names, batch.columns, strict=True):
            there = column.is_valid().to_pylist()
            lists = hasattr(column.chunk(0), "value_lengths")  # a column of lists of pictures
            sizes = [size for chunk in column.chunks for size in chunk.value_lengths().to_pylist()] if lists else there
            counts = [count + int(size or 0) for count, size in zip(counts, sizes, strict=True)]
            for cells in (chunk.flatten() if lists else chunk for chunk in column.chunks):
                struct = hasattr(cells, "field") and cells.type.get_field_index("bytes") >= 0
                if not struct and str(cells.type) not in ("binary", "large_binary", "null"):
                    raise InputError(f"{where}: the column {name} does not hold pictures; give a table that does")
        yield from counts
