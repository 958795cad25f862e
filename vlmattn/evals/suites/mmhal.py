"""MMHal-Bench (arXiv 2309.14525) on its published file: open questions whose answers a judge rates."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path, PurePosixPath

from vlmattn.evals.judges import CLEAN, Judge, load_judge
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample
from vlmattn.evals.suites.files import ImageFiles, ImageFolder, Item, read_keyed
from vlmattn.evals.suites.rated import HALLUCINATIONS, Key, Rated
from vlmattn.evals.suites.registry import suite

_NEEDS = ("image_src", "image_content", "question_type", "question", "gt_answer")


@suite("mmhal", "open questions, rated by a judge", "MMHal-Bench's response_template.json", "arXiv 2309.14525")
class MMHal(Rated):
    """rating = mean of the judge's ratings, 0..6; hallucinations = share below 3. Splits: types of question."""

    title = "MMHal-Bench: open questions, rated by a judge"
    fields = ("rating", "hallucinated", "asked")
    metrics = (
        Metric("rating", {"rating": 1}, {"asked": 1}, "mean rating, 0 to 6", scale=1.0),
        replace(HALLUCINATIONS, about="answers rated below 3"),
    )

    @classmethod
    def on_files(
        cls,
        data: Path,
        images: Path,
        limit: int | None = None,
        max_new_tokens: int = 512,
        judge: Judge | str = "rule",
        allow_outside: bool = False,
    ) -> MMHal:
        """The published file; the answers in it are not read.

        Args:
            images: folder of the images, named as in ``image_src`` or by ``image_id``.
            judge: who rates, as ``load_judge`` takes it.

        Raises:
            InputError: a file that cannot be read, or is not in the published form; no such judge.
        """
        judge = load_judge(judge)  # before the file is read
        items = read_keyed(data, "image_id", _NEEDS, "an MMHal-Bench question")
        folder = ImageFolder(images, allow_outside)
        samples = [_sample(key, items[key], folder) for key in list(items)[:limit]]
        return cls(samples, {"questions": data.name, "limit": limit}, judge, max_new_tokens)

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        rating = self.rated(sample, answer).rating
        return {"rating": rating, "hallucinated": float(rating < CLEAN), "asked": 1.0}


def _sample(key: str, item: Item, folder: ImageFolder) -> Sample:
    return Sample(
        id=key,
        image_id=key,
        condition="mmhal",
        splits=(item.text("question_type"),),
        prompt=item.text("question"),
        images=ImageFiles((_picture(folder, key, item),)),
        truth=Key(item.text("gt_answer"), tuple(item.texts("image_content"))),
    )


def _picture(folder: ImageFolder, key: str, item: Item) -> Path:
    """Where the image lies: by the name it has in its address, or by its id."""
    name = PurePosixPath(item.text("image_src").partition("?")[0]).name or key
    by_id = folder.file(item.where, key + (PurePosixPath(name).suffix or ".jpg"))
    return by_id if os.path.isfile(by_id) else folder.file(item.where, name)
