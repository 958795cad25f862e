"""MMHal-Bench (arXiv 2309.14525) on its published file: open questions whose answers a judge rates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlmattn.evals.judges import CLEAN, Judge, Ratings
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFiles, ImageFolder, Item
from vlmattn.evals.suites.keyed import read_keyed

_NEEDS = ("image_src", "image_content", "question_type", "question", "gt_answer")


@dataclass(frozen=True)
class _Key:
    reference: str
    contents: tuple[str, ...]


class MMHal(Suite):
    """rating = mean of the judge's ratings, 0..6; hallucinations = ratings below 3 / answers. Splits: types of question.

    Args:
        questions: a file like ``response_template.json``; the answers in it are not read.
        images: folder of the images, named as in ``image_src`` or by ``image_id``.
        limit: use the first so many questions.
        judge: who rates; default ``RuleJudge`` (experimental), where the paper asks GPT-4.
        allow_outside: whether the names of images may lead out of the folder.

    Raises:
        InputError: a file that cannot be read, or is not in the published form.
    """

    name = "mmhal"
    title = "MMHal-Bench: open questions, rated by a judge"
    fields = ("rating", "hallucinated", "asked")
    metrics = (
        Metric("rating", {"rating": 1}, {"asked": 1}, "mean rating, 0 to 6", scale=1.0),
        Metric(
            "hallucinations",
            {"hallucinated": 1},
            {"asked": 1},
            "answers rated below 3",
            better="lower",
            label="halluc.",
        ),
    )

    def __init__(
        self,
        questions: Path,
        images: Path,
        limit: int | None = None,
        max_new_tokens: int = 512,
        judge: Judge | None = None,
        allow_outside: bool = False,
    ) -> None:
        self._ratings = Ratings(judge)
        self.max_new_tokens = max_new_tokens
        self.settings = {
            "questions": questions.name,
            "limit": limit,
            "max_new_tokens": max_new_tokens,
            "judge": self._ratings.name,
        }
        items = read_keyed(questions, "image_id", _NEEDS, "an MMHal-Bench question")
        folder = ImageFolder(images, allow_outside)
        self._samples = [_sample(key, items[key], folder) for key in list(items)[:limit]]

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        key: _Key = sample.truth
        verdict = self._ratings.of(sample.id, sample.prompt, key.reference, key.contents, answer)
        return {"rating": verdict.rating, "hallucinated": float(verdict.rating < CLEAN), "asked": 1.0}

    def right(self, record: Mapping[str, float]) -> bool:
        return not record["hallucinated"]

    def expected(self, sample: Sample) -> str:
        return str(sample.truth.reference)


def _sample(key: str, item: Item, folder: ImageFolder) -> Sample:
    return Sample(
        id=key,
        image_id=key,
        condition="mmhal",
        splits=(item.text("question_type"),),
        prompt=item.text("question"),
        images=ImageFiles((_picture(folder, key, item),)),
        truth=_Key(item.text("gt_answer"), tuple(item.texts("image_content"))),
    )


def _picture(folder: ImageFolder, key: str, item: Item) -> Path:
    """Where the image lies: by the name it has in its address, or by its id."""
    name = PurePosixPath(item.text("image_src").partition("?")[0]).name or key
    by_id = folder.file(item.where, key + (PurePosixPath(name).suffix or ".jpg"))
    return by_id if os.path.isfile(by_id) else folder.file(item.where, name)
