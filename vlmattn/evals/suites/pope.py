"""POPE: is there an X in the image? (arXiv 2305.10355), on generated scenes or on the published files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmattn.embedded.text import existence_question
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFolder, Item, first_of_each, read_items
from vlmattn.evals.suites.questions import sample_of
from vlmattn.evals.suites.registry import Form, suite
from vlmattn.evals.suites.tables import Table
from vlmattn.evals.suites.world import World, absent_objects, settings_of

SPLITS = ("random", "popular", "adversarial")
_ALL = {"tp": 1.0, "fp": 1.0, "tn": 1.0, "fn": 1.0}


def says_yes(answer: str) -> bool:
    """POPE's rule: up to the first full stop, without commas, "No", "not" or "no" means no, all else yes."""
    return not {"No", "not", "no"} & set(answer.partition(".")[0].replace(",", "").split(" "))


@suite(
    "pope",
    "is there an X in the image?",
    "POPE's question files, each a column of its own, or the table lmms-lab/POPE",
    "arXiv 2305.10355",
    [Form("POPE", ("question", "answer", "image_source", "category"))],
)
class Pope(Suite):
    """Yes/no questions about the presence of objects; *yes* is the positive class."""

    title = "POPE: is there a ... in the image?"
    fields = ("tp", "fp", "tn", "fn")
    mean_of_splits = True
    max_new_tokens = 16
    metrics = (
        Metric("accuracy", {"tp": 1, "tn": 1}, _ALL, "share of right answers"),
        Metric("precision", {"tp": 1}, {"tp": 1, "fp": 1}, "share of yes answers that are right", label="prec"),
        Metric("recall", {"tp": 1}, {"tp": 1, "fn": 1}, "share of present objects that are confirmed"),
        Metric("f1", {"tp": 2}, {"tp": 2, "fp": 1, "fn": 1}, "harmonic mean of precision and recall"),
        Metric(
            "yes_ratio",
            {"tp": 1, "fp": 1},
            _ALL,
            "share of yes among the answers (half of the truths are yes)",
            better="",
            label="yes",
        ),
    )

    @classmethod
    def on_scenes(cls, worlds: Sequence[World]) -> Pope:
        """Three things and three absent ones per scene and split; present things are shared by the splits."""
        samples = []
        for world in worlds:
            for index in range(world.count):
                scene = world.scene(index)
                asked: dict[str, list[str]] = {name: list(SPLITS) for name in scene.categories}
                for number, split in enumerate(SPLITS):
                    rng = np.random.default_rng([world.seed, index, number])
                    for name in absent_objects(scene, split, rng):
                        asked.setdefault(name, []).append(split)
                for name, splits in asked.items():
                    key, truth = f"{index}/{name}", name in scene.categories
                    samples.append(sample_of(world, index, key, tuple(splits), existence_question(name), truth))
        return cls(samples, settings_of(worlds))

    @classmethod
    def on_files(
        cls, data: Sequence[Path], images: Path, limit: int | None = None, allow_outside: bool = False, suffix: str = ""
    ) -> Pope:
        """Published question files (JSON lines or a JSON array); each file is a column, named by ``columns_of``.

        Args:
            data: files with ``image``, ``text`` and ``label`` (yes / no).
            limit: use the first so many questions of each file.
            suffix: words after each question, as papers ask for one word.

        Raises:
            InputError: a line that is not a question (file:line), an image that lies outside of the folder.
        """
        folder, columns = ImageFolder(images, allow_outside), columns_of(data)
        asked = (
            _sample(
                item, columns[path], item.text("image"), "text", "label", folder.files(item.where, [item.text("image")])
            )
            for path in data
            for item in read_questions(path)[:limit]
        )
        return cls._of(asked, {"questions": [path.name for path in data], "limit": limit}, suffix)

    @classmethod
    def on_table(cls, table: Table, limit: int | None = None, suffix: str = "") -> Pope:
        """The hub's table (lmms-lab/POPE); each category is a column.

        Args:
            limit: use the first so many questions of each category.

        Raises:
            InputError: an answer is not yes or no.
        """
        rows = first_of_each(table, lambda row: row.text("category"), limit)
        asked = (
            _sample(row, row.text("category"), _file_name(row.text("image_source")), "question", "answer", row.pictures)
            for row in rows
        )
        return cls._of(asked, {**table.settings, "limit": limit}, suffix)

    @classmethod
    def _of(cls, asked: Iterable[Sample], settings: Mapping[str, Any], suffix: str) -> Pope:
        """Questions that several splits share are asked once."""
        found: dict[str, Sample] = {}
        for sample in asked:
            before = found.get(sample.id)
            found[sample.id] = replace(sample, splits=before.splits + sample.splits) if before else sample
        samples = [replace(sample, prompt=f"{sample.prompt}{suffix}") for sample in found.values()]
        return cls(samples, {**settings, "suffix": suffix} if suffix else settings)

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        yes = says_yes(answer)
        field = ("tp" if yes else "fn") if sample.truth else ("fp" if yes else "tn")
        return {name: float(name == field) for name in self.fields}

    def right(self, record: Mapping[str, float]) -> bool:
        return bool(record["tp"] or record["tn"])

    def expected(self, sample: Sample) -> str:
        return "yes" if sample.truth else "no"


def _sample(
    item: Item, split: str, image: str, question: str, answer: str, pictures: Callable[[], list[Any]]
) -> Sample:
    """A question with the columns that hold it and its answer."""
    text, truth = item.text(question), item.yes(answer)
    key = f"{image}/{text}/{'yes' if truth else 'no'}"
    return Sample(key, image, "questions", (split,), text, pictures, truth)


def columns_of(files: Sequence[Path]) -> dict[Path, str]:
    """A column for each file: the split in its name; where files share it their names, or their paths."""
    within = {path: [name for name in SPLITS if name in path.stem] for path in files}
    for names in (
        {path: found[0] if len(found) == 1 else path.stem for path, found in within.items()},
        {path: path.stem for path in files},
    ):
        if len(set(names.values())) == len(names):
            return names
    return {path: str(path) for path in files}


def _file_name(source: str) -> str:
    """The table names images without their ending, the files with it: one name, so that samples have the same ids."""
    return source if Path(source).suffix else f"{source}.jpg"


def read_questions(path: Path) -> list[Item]:
    """Questions of a POPE file, with image, text and label; errors name file and line (or item, for an array)."""
    return read_items(path, ("image", "text", "label"), "a POPE question")
