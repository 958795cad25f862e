"""VQAv2 (arXiv 1612.00837): open questions against ten answers of people, compared as the released script does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFolder, Item
from vlmattn.evals.suites.questions import NUMBERS
from vlmattn.evals.suites.registry import Form, suite
from vlmattn.evals.suites.tables import Table
from vlmattn.evals.words import ENGLISH
from vlmattn.texts import read_json

_PROMPT = "{}\nAnswer the question using a single word or phrase."
_NUMBERS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # every one is removed or becomes a space
_FULL_STOPS = 32  # so many are removed, no more


def _corrections() -> Iterator[tuple[str, str]]:
    """Contracted words without an apostrophe, and with it."""
    for ending, words in ENGLISH["contracted"].items():
        for word in (stem + ending for stem in words.split()):
            for place in re.finditer("'", word):
                yield word[: place.start()] + word[place.end() :], word
    yield "somebody'd", "somebodyd"  # as the released list has it


_CORRECT = dict(_corrections())


@suite(
    "vqa",
    "VQAv2's open questions",
    "VQAv2's folder of questions and annotations (one *questions*.json, one *annotations*.json), or the table"
    " lmms-lab/VQAv2",
    "arXiv 1612.00837",
    [Form("VQAv2", ("question_id", "image_id", "question", "answers"), more=("answer_type",))],
)
class VQA(Suite):
    """accuracy = mean over the ten people of min(1, how many of the other nine said the same / 3).

    As in the released script, answers are compared as they are where all people gave the same one, and in the form of
    ``normal`` elsewhere: "Yes." is not the "yes" of all ten. ``normalised`` compares all in that form.
    """

    title = "VQAv2: open questions"
    fields = ("score", "normal", "asked")
    metrics = (
        Metric("accuracy", {"score": 1}, {"asked": 1}, "agreement with ten people, as the released script compares"),
        Metric(
            "normalised",
            {"normal": 1},
            {"asked": 1},
            "the same, without case, articles and marks also where all people agree",
            label="norm.",
        ),
    )
    max_new_tokens = 16

    @classmethod
    def on_files(cls, data: Path, images: Path, limit: int | None = None, allow_outside: bool = False) -> VQA:
        """The published files.

        Args:
            data: the folder, with one ``*questions*.json`` and one ``*annotations*.json``.
            images: folder of the COCO images, of the part that the questions file names (``data_subtype``, else
                val2014).

        Raises:
            InputError: a file that is not there, or not in the published form.
        """
        pictures = ImageFolder(images, allow_outside)
        _, annotations = _items(data, "annotations", ("question_id", "answers"))
        part, questions = _items(data, "questions", ("question_id", "image_id", "question"))
        people = {item.key("question_id"): item for item in annotations}
        samples = []
        for item in questions[:limit]:
            key = item.key("question_id")
            if key not in people:
                raise InputError(f"{data}: question {key} has no annotation")
            name = item.text("image") if item.values.get("image") else _file_name(part, item)
            samples.append(_sample(item, people[key], pictures.files(item.where, [name])))
        return cls(samples, {"folder": data.name, "limit": limit})

    @classmethod
    def on_table(cls, table: Table, limit: int | None = None) -> VQA:
        """The hub's table (lmms-lab/VQAv2), of which only the validation split has answers.

        Raises:
            InputError: a row without answers.
        """
        samples = []
        for row in itertools.islice(table, limit):
            if not row.values["answers"]:
                raise InputError(f"{row.where}: no answers of people; only the validation split has them")
            samples.append(_sample(row, row, row.pictures))
        return cls(samples, {**table.settings, "limit": limit})

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        people, said = [_on_a_line(one) for one in sample.truth], _on_a_line(answer)
        agreed = _agreement([normal(one) for one in people], normal(said))
        return {"score": agreed if len(set(people)) > 1 else _agreement(people, said), "normal": agreed, "asked": 1.0}

    def right(self, record: Mapping[str, float]) -> bool:
        return record["score"] >= 0.5

    def expected(self, sample: Sample) -> str:
        said: list[str] = sample.truth
        return max(said, key=said.count)


def _agreement(people: Sequence[str], said: str) -> float:
    """Mean over the people of min(1, how many of the others said the same / 3)."""
    same, total = people.count(said), len(people)
    # leaving out one who said the same leaves same - 1, leaving out another leaves same
    return (same * min(1.0, max(0, same - 1) / 3) + (total - same) * min(1.0, same / 3)) / total


def normal(answer: str) -> str:
    """An answer as it is compared where people disagree: the rules of the released script.

    1. A mark with a space beside it, or any mark where a comma stands between digits, is removed; others become a
    space. 2. Full stops without a digit behind them are removed.
    3. Lower case; numbers up to ten become digits ("none" 0), articles go, a missing apostrophe is put in ("dont").
    """
    text = answer
    thousands = re.search(r"\d,\d", answer)
    for mark in _MARKS:
        beside = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside or thousands else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=_FULL_STOPS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CORRECT.get(word, word) for word in words if word not in ("a", "an", "the"))


def _on_a_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _sample(asked: Item, known: Item, pictures: Callable[[], list[Any]]) -> Sample:
    people = known.values["answers"]
    if not isinstance(people, list) or not people or not all(isinstance(person, dict) for person in people):
        raise InputError(f"{known.where}: answers must be a list of objects, each with an answer")
    return Sample(
        id=asked.key("question_id"),
        image_id=asked.key("image_id"),
        condition="questions",
        splits=(known.text("answer_type") if known.values.get("answer_type") else "all",),
        prompt=_PROMPT.format(asked.text("question")),
        images=pictures,
        truth=[Item(known.where, person).key("answer") for person in people],
    )


def _file_name(part: str, item: Item) -> str:
    """The name of an image of COCO, whose id is a whole number."""
    key = item.key("image_id")
    if not key.isdecimal():
        raise InputError(f"{item.where}: image_id must be a whole number where no image is named, got '{key}'")
    return f"COCO_{part}_{int(key):012d}.jpg"


def _items(folder: Path, what: str, needs: Sequence[str]) -> tuple[str, list[Item]]:
    """The part of COCO that a file is about, and its rows."""
    found = sorted(folder.glob(f"*{what}*.json"))
    if len(found) != 1:
        raise InputError(f"{folder}: one file *{what}*.json is needed, there are {len(found)}")
    data = read_json(found[0])
    rows = data.get(what) if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{found[0]}: no list '{what}' in it")
    items = [Item(f"{found[0]}: {what}[{number}]", row) for number, row in enumerate(rows)]
    for item in items:
        if not isinstance(item.values, dict) or not set(needs) <= item.values.keys():
            raise InputError(f"{item.where} needs {', '.join(needs)}")
    return Item(str(found[0]), {"data_subtype": "val2014", **data}).text("data_subtype"), items
