"""Multiple choice about several images, in the form of MuirBench (arXiv 2406.09411) and BLINK (arXiv 2404.12390).

Both are tables of the hub (MUIRBENCH/MUIRBENCH, BLINK-Benchmark/BLINK). In a file, one JSON object per question (an array or lines):
``question``; ``options`` or ``choices``, a list; ``answer``, a letter, maybe in brackets; ``images`` or ``image_list``, file names in
order; optionally ``idx`` or ``id``, ``task`` or ``sub_task``, BLINK's ``prompt`` and MuirBench's ``counterpart_idx``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFiles, first_of_each, read_items
from vlmattn.evals.suites.tables import Table

_LETTERS = "ABCDEFGHIJ"


class Choice(Suite):
    """Accuracy by task; an answer is the letter it begins with, or that stands alone in it, or an option word for word."""

    name = "choice"
    title = "Multiple choice about several images"
    fields = ("right", "asked", "unread")
    metrics = (
        Metric("accuracy", {"right": 1}, {"asked": 1}, "share of right letters"),
        Metric("unread", {"unread": 1}, {"asked": 1}, "answers that name no option", better="lower"),
    )
    max_new_tokens = 16

    def __init__(self, samples: Sequence[Sample], settings: Mapping[str, object]) -> None:
        self._samples, self.settings = samples, dict(settings)

    @classmethod
    def on_file(cls, questions: Path, images: Path, limit: int | None = None) -> Choice:
        """A file of questions.

        Args:
            questions: the file.
            images: folder that its image names lie in.
            limit: use the first so many of each task.

        Raises:
            InputError: an entry that lacks something, an answer that is no option.
        """
        items = read_items(questions, ("question", "answer"), "a multiple-choice question")
        asked = (_Asked(where, item, *_pictures(where, item, images)) for where, item in items)
        return cls(_samples(str(questions), asked, limit), {"questions": questions.name, "limit": limit})

    @classmethod
    def on_table(cls, table: Table, limit: int | None = None) -> Choice:
        """The hub's table of MuirBench or BLINK.

        Args:
            limit: use the first so many of each task.

        Raises:
            InputError: a row without pictures, an answer that is no option.
        """
        asked = (_Asked(row.where, row.values, row.pictures, row.count) for row in table)
        return cls(_samples(table.name, asked, limit), {**table.settings, "limit": limit})

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        letter, options = sample.truth
        said = read_letter(answer, options)
        return {"right": float(said == letter), "asked": 1.0, "unread": float(said is None)}

    def right(self, record: Mapping[str, float]) -> bool:
        return bool(record["right"])

    def expected(self, sample: Sample) -> str:
        letter, options = sample.truth
        return f"{letter}. {options[_LETTERS.index(letter)]}"


def read_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer chooses, None if it names no option."""
    letters = _LETTERS[: len(options)]
    begins = re.match(rf"\s*\(?([{letters}])(?![A-Za-z'])", answer)
    stands = re.findall(rf"\(([{letters}])\)|\b([{letters}])(?=[.:)]|$)", answer)
    if begins:
        return str(begins.group(1))
    if stands:
        return str(next(filter(None, stands[0])))
    said = answer.strip().rstrip(".").lower()
    same = [
        letter for letter, option in zip(letters, options, strict=True) if option.strip().rstrip(".").lower() == said
    ]
    return same[0] if len(same) == 1 else None


@dataclass(frozen=True)
class _Asked:
    where: str
    item: Mapping[str, Any]
    pictures: Callable[[], list[Any]]
    count: int

    @property
    def task(self) -> str:
        return str(self.item.get("task", self.item.get("sub_task", "all")))


def _pictures(where: str, item: Mapping[str, Any], images: Path) -> tuple[ImageFiles, int]:
    names = item.get("images", item.get("image_list"))
    if not isinstance(names, list) or not names:
        raise InputError(f"{where}: images (or image_list) must be a list of file names")
    return ImageFiles.of(images, map(str, names)), len(names)


def _samples(source: str, asked: Iterable[_Asked], limit: int | None) -> list[Sample]:
    found, numbers = {}, itertools.count()
    keyed = ((str(one.item.get("idx", one.item.get("id", next(numbers)))), one) for one in asked)
    for key, one in first_of_each(keyed, lambda pair: pair[1].task, limit):
        if key in found:
            raise InputError(f"{source}: id '{key}' is there twice")
        found[key] = _sample(key, one)
    return list(found.values())


def _sample(key: str, asked: _Asked) -> Sample:
    item = asked.item
    options = item.get("options", item.get("choices"))
    if not isinstance(options, list) or not 2 <= len(options) <= len(_LETTERS):
        raise InputError(f"{asked.where}: options (or choices) must be a list of 2 to {len(_LETTERS)} answers")
    if not asked.count:
        raise InputError(f"{asked.where}: no picture")
    letter = str(item["answer"]).strip().strip("()").upper()
    if len(letter) != 1 or letter not in _LETTERS[: len(options)]:
        raise InputError(
            f"{asked.where}: answer must be a letter from A to {_LETTERS[len(options) - 1]}, got '{item['answer']}'"
        )
    # BLINK's prompt says what its question leaves out, and has the options
    question, *options = _numbered([str(item.get("prompt") or item["question"]), *map(str, options)])
    lines = [] if item.get("prompt") else [f"{name}. {option}" for name, option in zip(_LETTERS, options, strict=False)]
    twin = item.get("counterpart_idx")  # MuirBench asks about the same pictures once more, without a right option
    return Sample(
        id=key,
        image_id=key if twin is None else "+".join(sorted((key, str(twin)))),
        condition="questions",
        splits=(asked.task, f"{asked.count} images" if asked.count > 1 else "1 image"),
        prompt="\n".join(
            [question.strip(), *lines, "Answer with the option's letter from the given choices directly."]
        ),
        images=asked.pictures,
        truth=(letter, options),
        image_count=asked.count,
    )


def _numbered(texts: Iterable[str]) -> list[str]:
    """Marks for images become their numbers, through question and options: the pictures come first in the prompt."""
    numbers = itertools.count(1)
    return [re.sub("<image>", lambda _: f"(image {next(numbers)})", text) for text in texts]
