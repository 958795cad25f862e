"""MME (arXiv 2306.13394) on its published folders: two yes/no questions per image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample
from vlmattn.evals.suites.files import ImageFolder, first_of_each
from vlmattn.evals.suites.registry import Form, suite
from vlmattn.evals.suites.tables import Row, Table
from vlmattn.evals.suites.yesno import ACCURACY, YES_RATIO, YesNo, all_right
from vlmattn.texts import lines_of, read_text

_PICTURES = (".jpg", ".jpeg", ".png")


@suite(
    "mme",
    "two yes/no questions per image, both must be right",
    "MME's folder of subtasks, or the table lmms-lab/MME",
    "arXiv 2306.13394",
    [Form("MME", ("question_id", "question", "answer", "category"))],
)
class MME(YesNo):
    """Subtasks are splits; the score of one is accuracy + accuracy+, at most 200.

    An answer is read as by the released script: "yes" or "no" among its first four letters.
    """

    title = "MME: two questions per image, both must be right"
    fields = ("right", "wrong", "yes", "pair", "pair_asked", "halves")
    metrics = (
        Metric("score", {"right": 1, "pair": 2}, {"halves": 1}, "accuracy + accuracy+, at most 200", scale=100.0),
        ACCURACY,
        Metric(
            "accuracy_plus", {"pair": 1}, {"pair_asked": 1}, "share of images with both questions right", label="acc+"
        ),
        YES_RATIO,
    )

    @classmethod
    def on_files(cls, data: Path, limit: int | None = None, allow_outside: bool = False) -> MME:
        """The published folders.

        Args:
            data: one folder per subtask, with pictures and their question files, or with ``images`` and
                ``questions_answers_YN``.
            limit: use the first so many images of each subtask.
            allow_outside: whether pictures may be links that lead out of the folder.

        Raises:
            InputError: no subtask, a question file without picture, a line that is not "question<tab>Yes or No".
        """
        if not data.is_dir():
            raise InputError(f"no such folder: {data}")
        pictures = ImageFolder(data, allow_outside)
        samples: list[Sample] = []
        for task in sorted(path for path in data.iterdir() if path.is_dir()):
            for picture, questions in list(_pairs(task))[:limit]:
                image = f"{task.name}/{picture.name}"
                samples += _samples(
                    task.name,
                    image,
                    _questions(questions),
                    pictures.files(str(questions), [str(picture.relative_to(data))]),
                )
        if not samples:
            raise InputError(
                f"{data}: no MME subtask; each is a folder of pictures and question files of the same names"
            )
        return cls(samples, {"folder": data.name, "limit": limit})

    @classmethod
    def on_table(cls, table: Table, limit: int | None = None) -> MME:
        """The hub's table (lmms-lab/MME), whose ``question_id`` names the image of both its questions.

        Args:
            limit: use the first so many images of each subtask.

        Raises:
            InputError: an image with other than two questions, an answer that is not yes or no.
        """
        images: dict[tuple[str, str], list[Row]] = {}
        for row in table:
            images.setdefault((row.key("category"), row.key("question_id")), []).append(row)
        samples: list[Sample] = []
        for task, image in first_of_each(images, lambda key: key[0], limit):
            rows = images[task, image]
            if len(rows) != 2:
                raise InputError(f"{rows[0].where}: MME asks two questions per image, '{image}' has {len(rows)}")
            asked = [(row.text("question").strip(), row.yes("answer")) for row in rows]
            samples += _samples(task, image if "/" in image else f"{task}/{image}", asked, rows[0].pictures)
        return cls(samples, {**table.settings, "limit": limit})

    def read(self, answer: str) -> bool | None:
        start = answer.lower()[:4]
        return True if "yes" in start else False if "no" in start else None

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return {**super().score(sample, answer), "halves": 1.0}

    def records(self, answers: Mapping[str, str]) -> dict[str, dict[str, float]]:
        found = super().records(answers)
        all_right(found, {sample.id: sample.id.rpartition("/")[0] for sample in self._samples}, "pair")
        return found


def _samples(
    task: str, image: str, asked: Sequence[tuple[str, bool]], pictures: Callable[[], list[Any]]
) -> Iterator[Sample]:
    for number, (question, truth) in enumerate(asked):
        yield Sample(
            id=f"{image}/{number}",
            image_id=image,
            condition="mme",
            splits=(task,),
            prompt=question,
            images=pictures,
            truth=truth,
        )


def _pairs(task: Path) -> Iterator[tuple[Path, Path]]:
    texts, pictures = (task / "questions_answers_YN", task / "images") if (task / "images").is_dir() else (task, task)
    for questions in sorted(texts.glob("*.txt")):
        found = [pictures / (questions.stem + ending) for ending in _PICTURES]
        there = next((picture for picture in found if os.path.isfile(picture)), None)
        if there is None:
            raise InputError(f"{questions}: no picture {questions.stem} ({', '.join(_PICTURES)}) in {pictures}")
        yield there, questions


def _questions(path: Path) -> list[tuple[str, bool]]:
    found = []
    for number, line in enumerate(lines_of(read_text(path)), start=1):
        if not line.strip():
            continue
        question, tab, truth = line.rpartition("\t")
        if not tab or truth.strip().lower() not in ("yes", "no"):
            raise InputError(f"{path}:{number}: an MME line is 'question<tab>Yes' or '...<tab>No'")
        found.append((question.strip(), truth.strip().lower() == "yes"))
    if len(found) != 2:
        raise InputError(f"{path}: two questions are needed, one with the answer yes and one with no; got {len(found)}")
    return found
