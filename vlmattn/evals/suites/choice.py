"""Multiple choice about several images, in the form of MuirBench (arXiv 2406.09411) and BLINK (arXiv 2404.12390).

Both are tables of the hub (MUIRBENCH/MUIRBENCH, BLINK-Benchmark/BLINK). In a file, one JSON object per question (an array or lines):
``question``; ``options`` or ``choices``, a list; ``answer``, a letter, maybe in brackets; ``images`` or ``image_list``, file names in
order; optionally ``idx`` or ``id``, ``task`` or ``sub_task``, BLINK's ``prompt`` and MuirBench's ``counterpart_idx``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError, quoted
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFiles, ImageFolder, Item, first_of_each, read_items
from vlmattn.evals.suites.tables import Table

_LETTERS = "ABCDEFGHIJ"


class Choice(Suite):
    """Accuracy by task. How answers are read: ``read_letter``."""

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
    def on_file(cls, questions: Path, images: Path, limit: int | None = None, allow_outside: bool = False) -> Choice:
        """A file of questions.

        Args:
            questions: the file.
            images: folder that its image names lie in.
            limit: use the first so many of each task.
            allow_outside: whether the names may lead out of the folder.

        Raises:
            InputError: an entry that lacks something, an answer that is no option.
        """
        folder = ImageFolder(images, allow_outside)
        items = read_items(questions, ("question", "answer"), "a multiple-choice question")
        asked = (_Asked(item, *_pictures(item, folder)) for item in items)
        return cls(_samples(str(questions), asked, limit), {"questions": questions.name, "limit": limit})

    @classmethod
    def on_table(cls, table: Table, limit: int | None = None) -> Choice:
        """The hub's table of MuirBench or BLINK.

        Args:
            limit: use the first so many of each task.

        Raises:
            InputError: a row without pictures, an answer that is no option.
        """
        asked = (_Asked(row, row.pictures, row.count) for row in table)
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


_LETTER = r"(?<![\w+])(?<!\w['’-])(?<![A-Za-z]\.)[A-J](?![\w+])(?!['’-]\w)"
_MARKED = rf"[(\[\"']*{_LETTER}[)\]\"']*"
#: Letters in a row: "A", "(A) or (B)", "A, B and C".
_ROW = re.compile(rf"{_MARKED}(?:(?:\s*[,/&]\s*|\s+)(?:(?:or|and|nor)\s+)?{_MARKED})*")
#: Before one of these "A" and "I" are letters; before any other word an article and a pronoun.
_AFTER = re.compile(r"\s+(?:is|was|are|because|since|as|and|or|but|nor|with|which|has|seems|looks|would)\b", re.I)
_ENDS = re.compile(r"\s*(?:[.:,;!?–—]|\n|$|-\s)|\s+-\s")
_DENIED = re.compile(
    r"(?:\b(?:not|neither|nor|never|except|than)|n't)(?:\s+(?:be|the|answer|option|choice|letter|either|both))*\s*$",
    re.I,
)
_WRONG = re.compile(r"\s+(?:is|are|was|were)(?:n't|(?:\s+(?:both|all))?\s+(?:not|wrong|incorrect|false))\b", re.I)
_ANNOUNCED = re.compile(
    r"(?:\banswer(?:\s+(?:to|for|of)(?:\s+\w+){1,6}?)?|\b(?:correct|right|best)\s+(?:option|choice|letter|one)"
    r"|\b(?:choose|pick|select))(?:\s+(?:is|(?:would|should|must)\s+be))?\s*[:=]?\s*(?:(?:the\s+)?(?:option|choice|letter)\s+)?$",
    re.I,
)
_LEAD = re.compile(r"(?:the )?(?:(?:correct|right|best) )?(?:answer|option|choice)(?: is)? |it is |it's ")


def read_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer chooses, None if it names no option or several. The first of these that applies:

    1. The whole answer (behind "the answer is", "it is") is an option word for word, or a letter and its option.
    2. It announces a letter: "the correct answer is B ...", "answer: B", "I choose B".
    3. It begins with a letter that ends there or before a mark: "B", "(B) ...", "B. ...", "B, since ...".
    4. A letter stands alone in it: "It is C", "both show option C".

    Letters are capitals. "A" and "I" before a word are none ("A dog", "I think") unless it is "is", "because" or the like;
    nor are letters that are denied ("neither A nor B", "not A", "A is wrong").
    """
    answer = re.sub(r"[*`#]", "", answer)  # of markdown
    letters = set(_LETTERS[: len(options)])
    rows = [row for row in _rows(answer) if row.letters <= letters]
    by_rule = ([row for row in rows if row.announced], [row for row in rows if row.begins], rows)
    named = _same(answer, options) or next((_letters_of(chosen) for chosen in by_rule if chosen), set())
    return min(named) if len(named) == 1 else None


@dataclass(frozen=True)
class _Row:
    """Letters that an answer names in a row; whether it begins with them or announces them."""

    letters: frozenset[str]
    begins: bool
    announced: bool


def _rows(answer: str) -> Iterator[_Row]:
    """The letters of an answer that are none of its words and that it does not deny."""
    for found in _ROW.finditer(answer):
        before, row, after = answer[: found.start()], found.group(), answer[found.end() :]
        letters = re.findall(_LETTER, row)
        is_word = row[-1] in "AI" and re.match(r"[^\S\n]+\w", after) is not None and _AFTER.match(after) is None
        if is_word:
            letters.pop()
        if letters and not _DENIED.search(before) and (is_word or not _WRONG.match(after)):
            ends = is_word or row[-1] in ")]" or _ENDS.match(after) is not None
            yield _Row(frozenset(letters), ends and not before.strip(), _ANNOUNCED.search(before) is not None)


def _letters_of(rows: Iterable[_Row]) -> set[str]:
    return {letter for row in rows for letter in row.letters}


def _same(answer: str, options: Sequence[str]) -> set[str]:
    """The letters of the options that the whole answer repeats; a letter alone repeats none."""
    said = _plain(answer)
    lead = _LEAD.match(said)
    said = said[lead.end() :] if lead else said
    plain = {letter: _plain(option) for letter, option in zip(_LETTERS, options, strict=False)}
    return {
        letter for letter, option in plain.items() if len(said) > 1 and said in (option, f"{letter.lower()} {option}")
    }


def _plain(text: str) -> str:
    """A text in lower case, without marks at the ends of its words."""
    words = (word.strip(".,:;!?()[]\"'") for word in text.lower().split())
    return " ".join(word for word in words if word)


@dataclass(frozen=True)
class _Asked:
    item: Item
    pictures: Callable[[], list[Any]]
    count: int

    def key(self, *names: str) -> str | None:
        """The value of the first of some keys that the question has."""
        return next((self.item.key(name) for name in names if self.item.values.get(name) is not None), None)

    @property
    def task(self) -> str:
        return self.key("task", "sub_task") or "all"


def _pictures(item: Item, folder: ImageFolder) -> tuple[ImageFiles, int]:
    names = item.values.get("images", item.values.get("image_list"))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{item.where}: images (or image_list) must be a list of file names")
    return folder.files(item.where, names), len(names)


def _samples(source: str, asked: Iterable[_Asked], limit: int | None) -> list[Sample]:
    found: dict[str, Sample] = {}
    numbers = itertools.count()
    keyed = ((one.key("idx", "id") or str(next(numbers)), one) for one in asked)
    for key, one in first_of_each(keyed, lambda pair: pair[1].task, limit):
        if key in found:
            raise InputError(f"{source}: id '{key}' is there twice")
        found[key] = _sample(key, one)
    return list(found.values())


def _sample(key: str, asked: _Asked) -> Sample:
    item = asked.item
    listed = "options" if item.values.get("options") is not None else "choices"
    options = item.texts(listed) if isinstance(item.values.get(listed), list) else []
    if not 2 <= len(options) <= len(_LETTERS):
        raise InputError(f"{item.where}: options (or choices) must be a list of 2 to {len(_LETTERS)} answers")
    if not asked.count:
        raise InputError(f"{item.where}: no picture")
    letter = item.text("answer").strip().strip("()").upper()
    if len(letter) != 1 or letter not in _LETTERS[: len(options)]:
        raise InputError(
            f"{item.where}: answer must be a letter from A to {_LETTERS[len(options) - 1]}, got {quoted(letter)}"
        )
    # BLINK's prompt says what its question leaves out, and has the options
    prompt = item.text("prompt") if item.values.get("prompt") else ""
    question, *options = _numbered([prompt or item.text("question"), *options])
    lines = [] if prompt else [f"{name}. {option}" for name, option in zip(_LETTERS, options, strict=False)]
    twin = asked.key("counterpart_idx")  # MuirBench asks about the same pictures once more, without a right option
    return Sample(
        id=key,
        image_id=key if twin is None else "+".join(sorted((key, twin))),
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
