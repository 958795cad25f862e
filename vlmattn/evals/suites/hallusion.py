"""HallusionBench (arXiv 2310.14566) on its published file: yes/no questions about figures and altered figures.

Answers are read by their first yes or no; the paper asks a GPT judge instead (experimental: figures differ from published
ones where answers avoid both words). Questions without a figure are not asked, and count in none of the three figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError, quoted
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample
from vlmattn.evals.suites.files import ImageFolder, Item, read_items
from vlmattn.evals.suites.tables import Table
from vlmattn.evals.suites.yesno import ACCURACY, YES_RATIO, YesNo, all_right

_NEEDS = ("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer", "filename")


class HallusionBench(YesNo):
    """aAcc: answers; fAcc: figures all of whose questions are right; qAcc: questions right with every figure of their set."""

    name = "hallusion"
    title = "HallusionBench: figures, altered figures (first yes or no; no judge)"
    fields = ("right", "wrong", "yes", "figure", "figure_asked", "question", "question_asked")
    metrics = (
        Metric("aAcc", ACCURACY.over, ACCURACY.under, "share of right answers"),
        Metric("fAcc", {"figure": 1}, {"figure_asked": 1}, "figures with every question right"),
        Metric("qAcc", {"question": 1}, {"question_asked": 1}, "questions right with every figure of their set"),
        YES_RATIO,
    )

    def __init__(self, samples: Sequence[Sample], settings: Mapping[str, object]) -> None:
        self._samples, self.settings = list(samples), dict(settings)

    @classmethod
    def on_file(
        cls, questions: Path, images: Path, limit: int | None = None, allow_outside: bool = False
    ) -> HallusionBench:
        """The published file.

        Args:
            questions: ``HallusionBench.json``.
            images: folder that its file names lie in.
            limit: use the first so many questions with a figure.
            allow_outside: whether the file names may lead out of the folder.

        Raises:
            InputError: a file that is not there, or not in the published form.
        """
        folder = ImageFolder(images, allow_outside)
        shown = (
            (item, folder.files(item.where, [item.text("filename").removeprefix("./")]))
            for item in read_items(questions, _NEEDS, "a HallusionBench question")
            if item.values["filename"]  # otherwise asked without a figure: nothing to look at
        )
        return cls(_samples(str(questions), shown, limit), {"questions": questions.name, "limit": limit})

    @classmethod
    def on_table(cls, table: Table, limit: int | None = None) -> HallusionBench:
        """The hub's table (lmms-lab/HallusionBench).

        Raises:
            InputError: a row that is not in the published form.
        """
        shown = ((row, row.pictures) for row in table if row.count)
        return cls(_samples(table.name, shown, limit), {**table.settings, "limit": limit})

    def records(self, answers: Mapping[str, str]) -> dict[str, dict[str, float]]:
        found = super().records(answers)
        parts = {sample.id: (sample.image_id, *sample.id.rsplit("/", 2)[1:]) for sample in self._samples}
        all_right(found, {key: f"{of}/{figure}" for key, (of, figure, _) in parts.items()}, "figure")
        all_right(found, {key: f"{of}/{question}" for key, (of, _, question) in parts.items()}, "question")
        return found


def _samples(source: str, shown: Iterable[tuple[Item, Callable[[], list[Any]]]], limit: int | None) -> list[Sample]:
    """Of questions with a figure, each with its pictures."""
    found: list[Sample] = []
    for item, pictures in itertools.islice(shown, limit):
        truth = item.key("gt_answer")
        if truth not in ("0", "1"):
            raise InputError(f"{item.where}: gt_answer must be 0 or 1, got {quoted(truth)}")
        of = "/".join(item.key(name) for name in ("category", "subcategory", "set_id"))
        found.append(
            Sample(
                id=f"{of}/{item.key('figure_id')}/{item.key('question_id')}",
                image_id=of,  # figures of a set show variants of one picture: they are drawn together
                condition="hallusion",
                splits=(item.key("subcategory"),),
                prompt=item.text("question"),
                images=pictures,
                truth=truth == "1",
            )
        )
    if len({sample.id for sample in found}) < len(found):
        raise InputError(f"{source}: a question of a figure is there twice")
    return found
