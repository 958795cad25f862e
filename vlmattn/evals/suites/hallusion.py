"""HallusionBench (arXiv 2310.14566) on its published file: yes/no questions about figures and altered figures.

Answers are read by their first yes or no; the paper asks a GPT judge instead (experimental: figures differ from published
ones where answers avoid both words).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample
from vlmattn.evals.suites.files import ImageFiles, read_items
from vlmattn.evals.suites.yesno import ACCURACY, YES_RATIO, YesNo, all_right

_NEEDS = ("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer", "filename")


class HallusionBench(YesNo):
    """aAcc: answers; fAcc: figures all of whose questions are right; qAcc: questions right with every figure of their set.

    Args:
        questions: ``HallusionBench.json``.
        images: folder that its file names lie in.
        limit: use the first so many questions with a figure.

    Raises:
        InputError: a file or image that is not there, or not in the published form.
    """

    name = "hallusion"
    title = "HallusionBench: figures, altered figures (first yes or no; no judge)"
    fields = ("right", "wrong", "yes", "figure", "figure_asked", "question", "question_asked")
    metrics = (
        Metric("aAcc", ACCURACY.over, ACCURACY.under, "share of right answers"),
        Metric("fAcc", {"figure": 1}, {"figure_asked": 1}, "figures with every question right"),
        Metric("qAcc", {"question": 1}, {"question_asked": 1}, "questions right with every figure of their set"),
        YES_RATIO,
    )

    def __init__(self, questions: Path, images: Path, limit: int | None = None) -> None:
        self.settings = {"questions": questions.name, "limit": limit}
        self._samples = []
        self._figures: dict[str, str] = {}
        self._questions: dict[str, str] = {}
        for where, item in read_items(questions, _NEEDS, "a HallusionBench question"):
            if not item["filename"]:  # asked without a figure: nothing to look at
                continue
            if str(item["gt_answer"]) not in ("0", "1"):
                raise InputError(f"{where}: gt_answer must be 0 or 1, got '{item['gt_answer']}'")
            self._add(item, images)
            if len(self._samples) == limit:
                break
        if len({sample.id for sample in self._samples}) < len(self._samples):
            raise InputError(f"{questions}: a question of a figure is there twice")

    def _add(self, item: dict[str, Any], images: Path) -> None:
        of = f"{item['category']}/{item['subcategory']}/{item['set_id']}"
        key = f"{of}/{item['figure_id']}/{item['question_id']}"
        self._figures[key] = f"{of}/{item['figure_id']}"
        self._questions[key] = f"{of}/{item['question_id']}"
        self._samples.append(
            Sample(
                id=key,
                image_id=of,  # figures of a set show variants of one picture: they are drawn together
                condition="hallusion",
                splits=(str(item["subcategory"]),),
                prompt=str(item["question"]),
                images=ImageFiles.of(images, [str(item["filename"]).removeprefix("./")]),
                truth=str(item["gt_answer"]) == "1",
            )
        )

    def records(self, answers: Mapping[str, str]) -> dict[str, dict[str, float]]:
        found = super().records(answers)
        all_right(found, self._figures, "figure")
        all_right(found, self._questions, "question")
        return found
