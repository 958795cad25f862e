"""Suites that differ in columns only: a YAML file says which column holds what, one class reads answers by yes and no, one by letters.

Keys of such a file (those with * have to be there):

- ``name``*, ``kind``* (``yes_no`` or ``choice``), ``title``*, ``about``, ``data`` (what its files are, in words), ``source``
  (paper), ``item`` (a question in words, for errors), ``condition``, ``max_new_tokens``, ``ending`` (a line after each question).
- ``columns``*: where a question has its ``question``*, ``answer``*, ``images``* (a file name or a list of them), ``options``* (of
  choices), ``id`` (else its number), ``cluster`` (what the bootstrap draws together, else the images), ``split``; of choices
  also ``prompt`` (asked in place of question and options) and ``twin`` (the id of a question about the same images). A column
  is a name, a list of which the first one that is there counts, or a text with names in braces.
- ``answers``: the values that mean yes and no (else these words); ``accuracy``: the name of that metric; ``groups``: metrics of
  questions that must all be right, each with ``name``, ``field``, ``of`` (a column) and ``about``.
- ``without_image``: ``leave out`` questions whose image is empty; otherwise they are an error.
- ``tables``: forms of its tables on the hub, each with ``name``, ``needs``, ``pictures`` and ``more``;
  ``all_configs``: whether all configurations of a table are read, not one.
- ``files`` and ``images``: its own question files and their folder, beside the YAML file.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vlmattn.errors import InputError, OptionError, UnknownNameError, quoted
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFolder, Item, first_of_each, read_items
from vlmattn.evals.suites.letters import LETTERS, read_letter
from vlmattn.evals.suites.registry import Form, SuiteInfo, register
from vlmattn.evals.suites.tables import Table
from vlmattn.evals.suites.yesno import ACCURACY, YES_RATIO, YesNo, all_right
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
    tables: Sequence[Mapping[str, Any]] = ()
    all_configs: bool = False
    files: Sequence[str] = ()
    images: str = ""

    def needs(self, tables: bool = False) -> list[str]:
        """The columns that every question has, with or without those of its images."""
        plain = [column for role, column in self.columns.items() if role not in _OPTIONAL and isinstance(column, str)]
        shown = self.columns["images"] if tables else None
        names = [name for column in plain if column != shown for name in _names(column)]
        return list(dict.fromkeys(names))


_REQUIRED = {"yes_no": ("question", "answer", "images"), "choice": ("question", "answer", "images", "options")}
_OPTIONAL = ("prompt", "twin")
_ROLES = ("id", "cluster", "split", "question", "answer", "images", "options", *_OPTIONAL)


@dataclass(frozen=True)
class _Asked:
    """A question of a file or table, with its pictures."""

    item: Item
    pictures: Callable[[], list[Any]]
    count: int
    images: str = ""  # their names

    def value(self, column: Column | None) -> str | None:
        """What stands in a column, None if nothing does."""
        if isinstance(column, str) and "{" in column:
            return re.sub(r"\{(\w+)\}", lambda found: self.item.key(found[1]), column)
        there = (name for name in _names(column or ()) if self.item.values.get(name) is not None)
        return next((self.item.key(name) for name in there), None)

    def text(self, column: Column) -> str:
        """The text in a column.

        Raises:
            InputError: there is none, or something else.
        """
        names = _names(column)
        return self.item.text(next((name for name in names if self.item.values.get(name) is not None), names[0]))


def _names(column: Column | tuple[()]) -> list[str]:
    if isinstance(column, str):
        return re.findall(r"\{(\w+)\}", column) or [column]
    return list(column)


class Described(Suite):
    """Questions of a file or a table, as a description says.

    Args:
        about: the description.
        where: the file or table, for errors.
        asked: its questions.
        settings: what is written with every result.
        limit: use the first so many; of choices of each split.
    """

    def __init__(
        self, about: Description, where: str, asked: Iterable[_Asked], settings: Mapping[str, Any], limit: int | None
    ) -> None:
        chosen = list(self._limited(about, _with_images(asked, about), limit))
        numbers = itertools.count()
        keys = [one.value(about.columns.get("id")) or str(next(numbers)) for one in chosen]
        if len(set(keys)) < len(keys):
            raise InputError(f"{where}: id '{next(key for key in keys if keys.count(key) > 1)}' is there twice")
        samples = [self._sample(about, key, one) for key, one in zip(keys, chosen, strict=True)]
        super().__init__(samples, {**settings, "limit": limit}, about.max_new_tokens)
        self.name, self.title = about.name, about.title
        #: By field of a group: the group of each question.
        self._groups = {
            group["field"]: {key: str(one.value(group["of"])) for key, one in zip(keys, chosen, strict=True)}
            for group in about.groups
        }

    @classmethod
    def on_files(
        cls, about: Description, data: Path, images: Path, limit: int | None = None, allow_outside: bool = False
    ) -> Described:
        """A file of questions (JSON or JSON lines).

        Args:
            images: folder that its image names lie in.
            allow_outside: whether the names may lead out of the folder.

        Raises:
            InputError: a question that lacks something, or whose answer is none.
        """
        folder = ImageFolder(images, allow_outside)
        asked = (_on_disk(item, about, folder) for item in read_items(data, about.needs(), about.item))
        return cls(about, str(data), asked, {"questions": data.name}, limit)

    @classmethod
    def on_table(cls, about: Description, table: Table, limit: int | None = None) -> Described:
        """A table of the hub; errors as of ``on_files``."""
        asked = (_Asked(row, row.pictures, row.count) for row in table)
        return cls(about, table.name, asked, table.settings, limit)

    @abstractmethod
    def _limited(self, about: Description, asked: Iterator[_Asked], limit: int | None) -> Iterator[_Asked]:
        """The questions that are used."""

    @abstractmethod
    def _sample(self, about: Description, key: str, asked: _Asked) -> Sample: ...


class DescribedYesNo(Described, YesNo):
    """Questions whose answers are read by their first yes or no, and metrics of groups that must be right as a whole."""

    def __init__(self, about: Description, *given: Any) -> None:
        super().__init__(about, *given)
        pairs = [(group["field"], f"{group['field']}_asked") for group in about.groups]
        grouped = (
            Metric(group["name"], {field: 1}, {asked: 1}, group.get("about", ""))
            for group, (field, asked) in zip(about.groups, pairs, strict=True)
        )
        self.fields = ("right", "wrong", "yes", *itertools.chain(*pairs))
        self.metrics = (dataclasses.replace(ACCURACY, name=about.accuracy), *grouped, YES_RATIO)

    def _limited(self, about: Description, asked: Iterator[_Asked], limit: int | None) -> Iterator[_Asked]:
        return itertools.islice(asked, limit)

    def _sample(self, about: Description, key: str, asked: _Asked) -> Sample:
        column = about.columns["answer"]
        said, answers = asked.value(column), about.answers or {"yes": ["yes"], "no": ["no"]}
        truth = next(
            (word for word, texts in answers.items() if str(said).strip().lower() in map(str.lower, texts)), None
        )
        if truth is None:
            words = " or ".join(itertools.chain(*answers.values()))
            raise InputError(f"{asked.item.where}: {' or '.join(_names(column))} must be {words}, got {quoted(said)}")
        return Sample(
            id=key,
            image_id=asked.value(about.columns.get("cluster")) or asked.images or key,
            condition=about.condition or about.name,
            splits=(asked.value(about.columns.get("split")) or "all",),
            prompt="\n".join(filter(None, (asked.text(about.columns["question"]), about.ending))),
            images=asked.pictures,
            truth=truth == "yes",
            image_count=asked.count,
        )

    def records(self, answers: Mapping[str, str]) -> dict[str, dict[str, float]]:
        found = super().records(answers)
        for field, groups in self._groups.items():
            all_right(found, groups, field)
        return found


class DescribedChoice(Described):
    """Questions with options, in letters; accuracy by split and by number of images. How answers are read: ``read_letter``."""

    fields = ("right", "asked", "unread")
    metrics = (
        Metric("accuracy", {"right": 1}, {"asked": 1}, "share of right letters"),
        Metric("unread", {"unread": 1}, {"asked": 1}, "answers that name no option", better="lower"),
    )

    def _limited(self, about: Description, asked: Iterator[_Asked], limit: int | None) -> Iterator[_Asked]:
        return first_of_each(asked, lambda one: one.value(about.columns.get("split")) or "all", limit)

    def _sample(self, about: Description, key: str, asked: _Asked) -> Sample:
        columns, item = about.columns, asked.item
        names = _names(columns["options"])
        listed = next((name for name in names if item.values.get(name) is not None), names[-1])
        options = item.texts(listed) if isinstance(item.values.get(listed), list) else []
        if not 2 <= len(options) <= len(LETTERS):
            raise InputError(f"{item.where}: {_or(names)} must be a list of 2 to {len(LETTERS)} answers")
        letter = asked.text(columns["answer"]).strip().strip("()").upper()
        if len(letter) != 1 or letter not in LETTERS[: len(options)]:
            last = LETTERS[len(options) - 1]
            raise InputError(f"{item.where}: answer must be a letter from A to {last}, got {quoted(letter)}")
        prompt = asked.value(columns.get("prompt"))
        question, *options = _numbered([prompt or asked.text(columns["question"]), *options])
        lines = [] if prompt else [f"{name}. {option}" for name, option in zip(LETTERS, options, strict=False)]
        twin = asked.value(columns.get("twin"))
        cluster = asked.value(columns.get("cluster")) or (key if "cluster" in columns else asked.images) or key
        return Sample(
            id=key,
            image_id=cluster if twin is None else "+".join(sorted((cluster, twin))),
            condition=about.condition or about.name,
            splits=(
                asked.value(columns.get("split")) or "all",
                f"{asked.count} images" if asked.count > 1 else "1 image",
            ),
            prompt="\n".join([question.strip(), *lines, *filter(None, [about.ending])]),
            images=asked.pictures,
            truth=(letter, options),
            image_count=asked.count,
        )

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        letter, options = sample.truth
        said = read_letter(answer, options)
        return {"right": float(said == letter), "asked": 1.0, "unread": float(said is None)}

    def expected(self, sample: Sample) -> str:
        letter, options = sample.truth
        return f"{letter}. {options[LETTERS.index(letter)]}"


_KINDS: Mapping[str, type[Described]] = {"yes_no": DescribedYesNo, "choice": DescribedChoice}


def _or(names: Sequence[str]) -> str:
    return names[0] + "".join(f" (or {name})" for name in names[1:])


def _on_disk(item: Item, about: Description, folder: ImageFolder) -> _Asked:
    """A question of a file with its pictures; without any where its image is empty."""
    names = _names(about.columns["images"])
    value = next((item.values[name] for name in names if item.values.get(name) is not None), None)
    shown = [value] if isinstance(value, str) and value else value
    if shown in (None, "") and about.without_image:
        return _Asked(item, list, 0)
    if not isinstance(shown, list) or not shown or not all(isinstance(name, str) for name in shown):
        raise InputError(f"{item.where}: {_or(names)} must be a file name or a list of file names")
    return _Asked(item, folder.files(item.where, shown), len(shown), "+".join(shown))


def _with_images(asked: Iterable[_Asked], about: Description) -> Iterator[_Asked]:
    for one in asked:
        if one.count:
            yield one
        elif not about.without_image:
            raise InputError(f"{one.item.where}: no picture")


def _numbered(texts: Iterable[str]) -> list[str]:
    """Marks for images become their numbers, through question and options: the pictures come first in the prompt."""
    numbers = itertools.count(1)
    return [re.sub("<image>", lambda _: f"(image {next(numbers)})", text) for text in texts]


def read_suite(path: Path) -> SuiteInfo:
    """The suite that a file describes.

    Raises:
        InputError: it cannot be read, lacks a key, or has a value of another kind.
        UnknownNameError: a key or a column's role that there is none of.
        OptionError: another kind than yes_no and choice.
    """
    told = parse_data(read_text(path), str(path))
    about = _description(told, path)
    kind = _KINDS[about.kind]
    forms = [_form(one, path) for one in about.tables]
    usual = Form(about.name, tuple(about.needs(tables=True)), tuple(_names(about.columns["images"])))
    return SuiteInfo(
        name=about.name,
        about=about.about or about.title,
        data=about.data,
        source=about.source,
        forms=tuple(forms) or (usual,),
        doors={door: functools.partial(getattr(kind, f"on_{door}"), about) for door in ("files", "table")},
        all_configs=about.all_configs,
        own_data=tuple(path.parent / name for name in about.files),
        own_images=path.parent / about.images if about.images else None,
    )


def _form(told: Mapping[str, Any], path: Path) -> Form:
    known = [spec.name for spec in dataclasses.fields(Form)]
    for key, value in told.items():
        if key not in known:
            raise UnknownNameError(f"key of a table in {path}", str(key), known)
        if not (isinstance(value, str) if key == "name" else _texts(value)):
            raise InputError(f"{path}: {key} of a table must be {'a text' if key == 'name' else 'a list of columns'}")
    return Form(
        told["name"],
        *(tuple(told.get(key, usual)) for key, usual in (("needs", ()), ("pictures", ("image",)), ("more", ()))),
    )


def register_suite(path: Path) -> None:
    """Make the suite that a file describes known by its name: for packages that bring one."""
    register(read_suite(path))


def _description(told: Any, path: Path) -> Description:
    if not isinstance(told, dict):
        raise InputError(f"{path}: a suite is described by keys and values")
    known = {spec.name: spec for spec in dataclasses.fields(Description)}
    for key in told:
        if key not in known:
            raise UnknownNameError(f"key in {path}", str(key), known)
    if missing := [name for name in ("name", "kind", "title", "columns") if name not in told]:
        raise InputError(f"{path}: {missing[0]} is missing; a suite needs name, kind, title and columns")
    for key, value in told.items():
        _check(path, key, value, str(known[key].type))
    if told["kind"] not in _KINDS:
        raise OptionError(f"{path}: kind must be {' or '.join(_KINDS)}, got {quoted(told['kind'])}")
    for role, column in told["columns"].items():
        if role not in _ROLES:
            raise UnknownNameError(f"column in {path}", str(role), _ROLES)
        if not ((isinstance(column, str) and column) or _texts(column)):
            raise InputError(f"{path}: columns.{role} must be the name of a column, or a list of names")
    for role in _REQUIRED[told["kind"]]:
        if role not in told["columns"]:
            raise InputError(f"{path}: columns.{role} is missing; it says which column holds the {role}")
    if "answers" in told:  # YAML takes the words yes and no for truth values
        words = {{True: "yes", False: "no"}.get(key, key): value for key, value in told["answers"].items()}
        if set(words) != {"yes", "no"} or not all(map(_texts, words.values())):
            raise InputError(f"{path}: answers must have the keys yes and no, each with a list of texts")
        told = {**told, "answers": words}
    if isinstance(told.get("files"), str):
        told = {**told, "files": [told["files"]]}
    return Description(**told)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _check(path: Path, key: str, value: Any, kind: str) -> None:
    """Raise for a value of another kind than the description's field has."""
    if key == "files":
        right, words = isinstance(value, str) or _texts(value), "a file name or a list of them"
    elif kind == "str":
        right, words = isinstance(value, str), "a text"
    elif kind == "int":
        right, words = isinstance(value, int) and not isinstance(value, bool) and value > 0, "a whole number above 0"
    elif kind == "bool":
        right, words = isinstance(value, bool), "true or false"
    elif key in ("columns", "answers"):
        right, words = isinstance(value, dict), "a mapping"
    else:
        needed = {"groups": ("name", "field", "of"), "tables": ("name", "needs")}[key]
        right = isinstance(value, list) and all(isinstance(one, dict) and set(needed) <= one.keys() for one in value)
        words = f"a list of mappings with {', '.join(needed)}"
    if not right:
        raise InputError(f"{path}: {key} must be {words}, got {quoted(value)}")


for _path in sorted(Path(__file__).parent.glob("*.yaml")):
    register_suite(_path)
