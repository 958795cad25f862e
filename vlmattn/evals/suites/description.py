"""What a YAML file says of a suite that differs from others in its columns only.

Keys of such a file (those with * have to be there):

- ``name``*, ``kind``* (``yes_no`` or ``choice``), ``title``*, ``about``, ``data`` (what its files are, in words),
  ``source`` (paper), ``item`` (a question in words, for errors), ``condition``, ``max_new_tokens``, ``ending`` (a line
  after each question).
- ``columns``*: where a question has its ``question``*, ``answer``*, ``images``* (a file name or a list of them),
  ``options``* (of choices), ``id`` (else its number), ``cluster`` (what the bootstrap draws together, else the images),
  ``split``; of choices also ``prompt`` (asked in place of question and options) and ``twin`` (the id of a question
  about the same images). A column is a name, a list of which the first one that is there counts, or a text with names
  in braces.
- ``answers``: the values that mean yes and no (else these words); ``accuracy``: the name of that metric; ``groups``:
  metrics of questions that must all be right, each with ``name``, ``field``, ``of`` (a column) and ``about``.
- ``without_image``: ``leave out`` questions whose image is empty; otherwise they are an error.
- ``tables``: forms of its tables on the hub, each with ``name``, ``needs``, ``pictures`` and ``more``;
  ``all_configs``: whether all configurations of a table are read, not one.
- ``files`` and ``images``: its own question files and their folder, beside the YAML file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vlmattn.errors import InputError, UnknownNameError, quoted
from vlmattn.evals.suites.registry import Form
from vlmattn.texts import parse_data, read_text

Column: TypeAlias = "str | list[str]"  # a name, names of which the first counts, or a text with names in braces


@dataclass(frozen=True)
class Description:
    """What a file says of a suite; see the module."""

    name: str
    kind: str
    title: str
    columns: Mapping[str, Column]
    about: str = ""
    data: str = "a file of questions"
    source: str = ""
    item: str = "a question"
    condition: str = ""
    max_new_tokens: int = 16
    ending: str = ""
    answers: Mapping[str, Sequence[str]] | None = None
    accuracy: str = "accuracy"
    groups: Sequence[Mapping[str, str]] = ()
    without_image: str = ""
    tables: Sequence[Form] = ()
    all_configs: bool = False
    files: Sequence[str] = ()
    images: str = ""

    def needs(self, tables: bool = False) -> list[str]:
        """The columns that every question has, with or without those of its images."""
        plain = [column for role, column in self.columns.items() if role not in _OPTIONAL and isinstance(column, str)]
        shown = self.columns["images"] if tables else None
        names = [name for column in plain if column != shown for name in names_in(column)]
        return list(dict.fromkeys(names))


_REQUIRED = {"yes_no": ("question", "answer", "images"), "choice": ("question", "answer", "images", "options")}
_OPTIONAL = ("prompt", "twin")
_ROLES = ("id", "cluster", "split", "question", "answer", "images", "options", *_OPTIONAL)


def names_in(column: Column | tuple[()]) -> list[str]:
    """The columns that a column of a description stands for."""
    if isinstance(column, str):
        return re.findall(r"\{(\w+)\}", column) or [column]
    return list(column)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _mappings(*keys: str) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(one, dict) and set(keys) <= one.keys() for one in value)

    return fits, f"a list of mappings with {', '.join(keys)}"


#: What the value of a key must be, and in words; a text where nothing else is said.
_VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda value: value in _REQUIRED, " or ".join(_REQUIRED)),
    "columns": (lambda value: isinstance(value, dict), "a mapping"),
    "answers": (
        lambda value: isinstance(value, dict) and set(value) == {"yes", "no"} and all(map(_texts, value.values())),
        "a mapping with the keys yes and no, each with a list of texts",
    ),
    "max_new_tokens": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
    "without_image": (lambda value: value == "leave out", "'leave out'"),
    "all_configs": (lambda value: isinstance(value, bool), "true or false"),
    "files": (_texts, "a file name, or a list of them"),
    "groups": _mappings("name", "field", "of"),
    "tables": _mappings("name", "needs"),
    "column": (
        lambda value: (bool(value) and isinstance(value, str)) or _texts(value),
        "the name of a column, or a list of names",
    ),
    "of a table": (_texts, "a list of columns"),
}
_TEXT: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, str), "a text")


def _check(path: Path, key: str, value: Any, kind: str = "") -> None:
    fits, words = _VALUES.get(kind or key, _TEXT)
    if not fits(value):
        raise InputError(f"{path}: {key} must be {words}, got {quoted(value)}")


def _refuse_unknown(path: Path, what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise UnknownNameError(f"{what} in {path}", str(key), known)


def read_description(path: Path) -> Description:
    """The description in a file.

    Raises:
        InputError: it cannot be read, lacks a key, or has a value of another kind.
        UnknownNameError: a key or a column that no suite has.
    """
    told = parse_data(read_text(path), str(path))
    if not isinstance(told, dict):
        raise InputError(f"{path}: a suite is described by keys and values")
    _refuse_unknown(path, "key", told, [spec.name for spec in dataclasses.fields(Description)])
    if missing := [name for name in ("name", "kind", "title", "columns") if name not in told]:
        raise InputError(f"{path}: {missing[0]} is missing; a suite needs name, kind, title and columns")
    if isinstance(told.get("files"), str):
        told["files"] = [told["files"]]
    if isinstance(told.get("answers"), dict):  # YAML takes the words yes and no for truth values
        told["answers"] = {{True: "yes", False: "no"}.get(key, key): value for key, value in told["answers"].items()}
    for key, value in told.items():
        _check(path, key, value)
    _refuse_unknown(path, "column", told["columns"], _ROLES)
    for role, column in told["columns"].items():
        _check(path, f"columns.{role}", column, "column")
    for role in _REQUIRED[told["kind"]]:
        if role not in told["columns"]:
            raise InputError(f"{path}: columns.{role} is missing; it says which column holds the {role}")
    return Description(**{**told, "tables": [_form(one, path) for one in told.get("tables", ())]})


def _form(told: Mapping[str, Any], path: Path) -> Form:
    _refuse_unknown(path, "key of a table", told, [spec.name for spec in dataclasses.fields(Form)])
    for key, value in told.items():
        _check(path, f"{key} of a table", value, "name" if key == "name" else "of a table")
    columns = {key: tuple(value) for key, value in told.items() if key != "name"}
    return Form(told["name"], **columns)
