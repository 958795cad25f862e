"""Multiple choice about several images, in the form of MuirBench (arXiv 2406.09411) and BLINK (arXiv 2404.12390).

One JSON object per question (an array or lines): ``question``; ``options`` or ``choices``, a list; ``answer``, a letter, maybe in
brackets; ``images`` or ``image_list``, file names in order; optionally ``idx`` or ``id``, and ``task`` or ``sub_task``. The sets are
published as tables of the hub with the pictures inside; write those to files first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFiles, read_items

_LETTERS = "ABCDEFGHIJ"


class Choice(Suite):
    """Accuracy by task; an answer is the letter it begins with, or that stands alone in it, or an option word for word.

    Args:
        questions: the file.
        images: folder that its image names lie in.
        limit: use the first so many of each task.

    Raises:
        InputError: an entry that lacks something, an answer that is no option.
    """

    name = "choice"
    title = "Multiple choice about several images"
    fields = ("right", "asked", "unread")
    metrics = (
        Metric("accuracy", {"right": 1}, {"asked": 1}, "share of right letters"),
        Metric("unread", {"unread": 1}, {"asked": 1}, "answers that name no option", better="lower"),
    )
    max_new_tokens = 16

    def __init__(self, questions: Path, images: Path, limit: int | None = None) -> None:
        self.settings = {"questions": questions.name, "limit": limit}
        counts: dict[str, int] = {}
        self._samples: list[Sample] = []
        for number, (where, item) in enumerate(
            read_items(questions, ("question", "answer"), "a multiple-choice question")
        ):
            task = str(item.get("task", item.get("sub_task", "all")))
            counts[task] = counts.get(task, 0) + 1
            if limit is None or counts[task] <= limit:
                self._samples.append(_sample(where, item, str(item.get("idx", item.get("id", number))), task, images))
        ids = [sample.id for sample in self._samples]
        if len(set(ids)) < len(ids):
            raise InputError(f"{questions}: id '{next(i for i in ids if ids.count(i) > 1)}' is there twice")

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


def _sample(where: str, item: dict[str, Any], key: str, task: str, images: Path) -> Sample:
    options = item.get("options", item.get("choices"))
    names = item.get("images", item.get("image_list"))
    if not isinstance(options, list) or not 2 <= len(options) <= len(_LETTERS):
        raise InputError(f"{where}: options (or choices) must be a list of 2 to {len(_LETTERS)} answers")
    if not isinstance(names, list) or not names:
        raise InputError(f"{where}: images (or image_list) must be a list of file names")
    letter = str(item["answer"]).strip().strip("()").upper()
    if len(letter) != 1 or letter not in _LETTERS[: len(options)]:
        raise InputError(
            f"{where}: answer must be a letter from A to {_LETTERS[len(options) - 1]}, got '{item['answer']}'"
        )
    question = str(item["question"])
    for number in range(len(names)):  # the pictures come first in the prompt
        question = question.replace("<image>", f"(image {number + 1})", 1)
    lines = [question.strip(), *(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))]
    return Sample(
        id=key,
        image_id=key,
        condition="questions",
        splits=(task, f"{len(names)} images" if len(names) > 1 else "1 image"),
        prompt="\n".join([*lines, "Answer with the option's letter from the given choices directly."]),
        images=ImageFiles.of(images, map(str, names)),
        truth=(letter, [str(option) for option in options]),
        image_count=len(names),
    )
