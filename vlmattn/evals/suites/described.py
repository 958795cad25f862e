"""Suites that a YAML file describes (description.py): questions of yes and no, and questions with options."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError, quoted
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.description import Column, Description, names_in, read_description
from vlmattn.evals.suites.files import ImageFolder, Item, first_of_each, read_items
from vlmattn.evals.suites.letters import LETTERS, read_letter
from vlmattn.evals.suites.registry import Form, SuiteInfo, register
from vlmattn.evals.suites.tables import Table
from vlmattn.evals.suites.yesno import ACCURACY, YES_RATIO, YesNo, all_right


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
        there = (name for name in names_in(column or ()) if self.item.values.get(name) is not None)
        return next((self.item.key(name) for name in there), None)

    def text(self, column: Column) -> str:
        """The text in a column.

        Raises:
            InputError: there is none, or something else.
        """
        names = names_in(column)
        return self.item.text(next((name for name in names if self.item.values.get(name) is not None), names[0]))


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

    def _split(self, about: Description, asked: _Asked) -> str:
        return asked.value(about.columns.get("split")) or "all"

    @abstractmethod
    def _limited(self, about: Description, asked: Iterator[_Asked], limit: int | None) -> Iterator[_Asked]:
        """The questions that are used."""

    @abstractmethod
    def _sample(self, about: Description, key: str, asked: _Asked) -> Sample: ...


class DescribedYesNo(Described, YesNo):
    """Answers are read by their first yes or no; metrics of groups that must be right as a whole."""

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
            raise InputError(f"{asked.item.where}: {' or '.join(names_in(column))} must be {words}, got {quoted(said)}")
        return Sample(
            id=key,
            image_id=asked.value(about.columns.get("cluster")) or asked.images or key,
            condition=about.condition or about.name,
            splits=(self._split(about, asked),),
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
    """Accuracy by split and by number of images. How answers are read: ``read_letter``."""

    fields = ("right", "asked", "unread")
    metrics = (
        Metric("accuracy", {"right": 1}, {"asked": 1}, "share of right letters"),
        Metric("unread", {"unread": 1}, {"asked": 1}, "answers that name no option", better="lower"),
    )

    def _limited(self, about: Description, asked: Iterator[_Asked], limit: int | None) -> Iterator[_Asked]:
        return first_of_each(asked, functools.partial(self._split, about), limit)

    def _sample(self, about: Description, key: str, asked: _Asked) -> Sample:
        columns = about.columns
        options, letter = _options(columns, asked)
        prompt, twin = asked.value(columns.get("prompt")), asked.value(columns.get("twin"))
        question, *options = _numbered([prompt or asked.text(columns["question"]), *options])
        lines = [] if prompt else [f"{name}. {option}" for name, option in zip(LETTERS, options, strict=False)]
        cluster = asked.value(columns.get("cluster")) or (key if "cluster" in columns else asked.images or key)
        return Sample(
            id=key,
            image_id=cluster if twin is None else "+".join(sorted((cluster, twin))),
            condition=about.condition or about.name,
            splits=(self._split(about, asked), f"{asked.count} images" if asked.count > 1 else "1 image"),
            prompt="\n".join(filter(None, [question.strip(), *lines, about.ending])),
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


def _options(columns: Mapping[str, Column], asked: _Asked) -> tuple[list[str], str]:
    """The options of a question, and the letter of the right one."""
    item, names = asked.item, names_in(columns["options"])
    listed = next((name for name in names if item.values.get(name) is not None), names[-1])
    options = item.texts(listed) if isinstance(item.values.get(listed), list) else []
    if not 2 <= len(options) <= len(LETTERS):
        raise InputError(f"{item.where}: {_or(names)} must be a list of 2 to {len(LETTERS)} answers")
    letter = asked.text(columns["answer"]).strip().strip("()").upper()
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        last = LETTERS[len(options) - 1]
        raise InputError(f"{item.where}: answer must be a letter from A to {last}, got {quoted(letter)}")
    return options, letter


_KINDS: Mapping[str, type[Described]] = {"yes_no": DescribedYesNo, "choice": DescribedChoice}


def _or(names: Sequence[str]) -> str:
    return names[0] + "".join(f" (or {name})" for name in names[1:])


def _on_disk(item: Item, about: Description, folder: ImageFolder) -> _Asked:
    """A question of a file with its pictures; without any where its image is empty."""
    names = names_in(about.columns["images"])
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
    """The suite that a file describes; raises as ``read_description``."""
    about = read_description(path)
    kind = _KINDS[about.kind]
    usual = Form(about.name, tuple(about.needs(tables=True)), tuple(names_in(about.columns["images"])))
    return SuiteInfo(
        name=about.name,
        about=about.about or about.title,
        data=about.data,
        source=about.source,
        forms=tuple(about.tables) or (usual,),
        doors={door: functools.partial(getattr(kind, f"on_{door}"), about) for door in ("files", "table")},
        all_configs=about.all_configs,
        own_data=tuple(path.parent / name for name in about.files),
        own_images=path.parent / about.images if about.images else None,
    )


def register_suite(path: Path) -> None:
    """Make the suite that a file describes known by its name: for packages that bring one."""
    register(read_suite(path))


for _path in sorted(Path(__file__).parent.glob("*.yaml")):
    register_suite(_path)
