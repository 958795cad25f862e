"""VQAv2 (arXiv 1612.00837) on its published files: open questions against ten answers of people."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFiles, read_text
from vlmattn.evals.suites.tables import Table

_PROMPT = "{}\nAnswer the question using a single word or phrase."
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
_NUMBERS["none"] = "0"


class VQA(Suite):
    """accuracy = mean over the ten people of min(1, how many of the other nine said the same / 3).

    Answers are compared without case, articles, punctuation and apostrophes, numbers up to ten as digits. The released
    script puts apostrophes into a list of contractions instead, which differs in rare cases.
    """

    name = "vqa"
    title = "VQAv2: open questions"
    fields = ("score", "asked")
    metrics = (Metric("accuracy", {"score": 1}, {"asked": 1}, "agreement with ten people"),)
    max_new_tokens = 16

    def __init__(self, samples: Sequence[Sample], settings: Mapping[str, object]) -> None:
        self._samples, self.settings = samples, dict(settings)

    @classmethod
    def on_folder(cls, folder: Path, images: Path, limit: int | None = None) -> VQA:
        """The published files.

        Args:
            folder: with one ``*questions*.json`` and one ``*annotations*.json``.
            images: folder of the COCO images.
            limit: use the first so many questions.

        Raises:
            InputError: a file that is not there, or not in the published form.
        """
        people = {row["question_id"]: row for row in _rows(folder, "annotations", ("question_id", "answers"))}
        samples = []
        for row in _rows(folder, "questions", ("question_id", "image_id", "question"))[:limit]:
            if row["question_id"] not in people:
                raise InputError(f"{folder}: question {row['question_id']} has no annotation")
            name = row.get("image") or f"COCO_val2014_{int(row['image_id']):012d}.jpg"
            samples.append(_sample(row, people[row["question_id"]], ImageFiles.of(images, [str(name)])))
        return cls(samples, {"folder": folder.name, "limit": limit})

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
            samples.append(_sample(row.values, row.values, row.pictures))
        return cls(samples, {**table.settings, "limit": limit})

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        said = normal(answer)
        same = sum(normal(other) == said for other in sample.truth)
        total = len(sample.truth)
        # leaving out one who said the same leaves same - 1, leaving out another leaves same
        mean = (same * min(1.0, (same - 1) / 3) + (total - same) * min(1.0, same / 3)) / total
        return {"score": max(0.0, mean), "asked": 1.0}

    def right(self, record: Mapping[str, float]) -> bool:
        return record["score"] >= 0.5

    def expected(self, sample: Sample) -> str:
        said: list[str] = sample.truth
        return max(said, key=said.count)


def normal(answer: str) -> str:
    """An answer as it is compared."""
    text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|['’]", "", answer.lower().strip())
    words = re.sub(r"[^\w\s.,]", " ", text).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _sample(row: Mapping[str, Any], known: Mapping[str, Any], pictures: Callable[[], list[Any]]) -> Sample:
    return Sample(
        id=str(row["question_id"]),
        image_id=str(row["image_id"]),
        condition="questions",
        splits=(str(known.get("answer_type", "all")),),
        prompt=_PROMPT.format(row["question"]),
        images=pictures,
        truth=[str(person["answer"]) for person in known["answers"]],
    )


def _rows(folder: Path, part: str, needs: Sequence[str]) -> list[dict[str, Any]]:
    found = sorted(folder.glob(f"*{part}*.json"))
    if len(found) != 1:
        raise InputError(f"{folder}: one file *{part}*.json is needed, there are {len(found)}")
    try:
        data = json.loads(read_text(found[0]))
    except json.JSONDecodeError as error:
        raise InputError(f"{found[0]}:{error.lineno}: not valid JSON ({error.msg})") from None
    rows = data.get(part) if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{found[0]}: no list '{part}' in it")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not set(needs) <= row.keys():
            raise InputError(f"{found[0]}: {part}[{number}] needs {', '.join(needs)}")
    return rows
