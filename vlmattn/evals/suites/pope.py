"""POPE: is there an X in the image? (arXiv 2305.10355), on generated scenes or on the published files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmattn.embedded.text import existence_question
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFolder, Item, first_of_each, read_items
from vlmattn.evals.suites.tables import Table
from vlmattn.evals.suites.world import World, absent_objects

SPLITS = ("random", "popular", "adversarial")
_ALL = {"tp": 1.0, "fp": 1.0, "tn": 1.0, "fn": 1.0}


def says_yes(answer: str) -> bool:
    """POPE's own rule: up to the first full stop, without commas, "No", "not" or "no" between spaces means no, all else yes."""
    return not {"No", "not", "no"} & set(answer.partition(".")[0].replace(",", "").split(" "))


class Pope(Suite):
    """Yes/no questions about the presence of objects; *yes* is the positive class."""

    name = "pope"
    title = "POPE: is there a ... in the image?"
    fields = ("tp", "fp", "tn", "fn")
    mean_of_splits = True
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

    def __init__(self, samples: Sequence[Sample], settings: Mapping[str, object], max_new_tokens: int = 16) -> None:
        self._samples, self.settings, self.max_new_tokens = samples, dict(settings), max_new_tokens

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
                    samples.append(
                        Sample(
                            id=f"{world.name}/{index}/{name}",
                            image_id=str(index),
                            condition=world.name,
                            splits=tuple(splits),
                            prompt=existence_question(name),
                            images=lambda world=world, index=index: world.image(index),  # type: ignore[misc]
                            truth=name in scene.categories,
                        )
                    )
        return cls(samples, {"scenes": [world.settings() for world in worlds]})

    @classmethod
    def on_files(
        cls, questions: Sequence[Path], images: Path, limit: int | None = None, allow_outside: bool = False
    ) -> Pope:
        """Published question files (JSON lines or a JSON array); each file is a column, named by ``columns_of``.

        Args:
            questions: files with ``image``, ``text`` and ``label`` (yes / no).
            images: folder of the images they name.
            limit: use the first so many questions of each file.
            allow_outside: whether the names may lead out of the folder.

        Raises:
            InputError: a line that is not a question (file:line), an image that lies outside of the folder.
        """
        folder, columns = ImageFolder(images, allow_outside), columns_of(questions)
        asked = (
            _Question(
                columns[path],
                item.text("image"),
                item.text("text"),
                item.yes("label"),
                folder.files(item.where, [item.text("image")]),
            )
            for path in questions
            for item in _items(path)[:limit]
        )
        return cls(_samples(asked), {"questions": [path.name for path in questions], "limit": limit})

    @classmethod
    def on_table(cls, table: Table, limit: int | None = None) -> Pope:
        """The hub's table (lmms-lab/POPE); each category is a column.

        Args:
            limit: use the first so many questions of each category.

        Raises:
            InputError: an answer is not yes or no.
        """
        rows = first_of_each(table, lambda row: row.text("category"), limit)
        asked = (
            _Question(
                row.text("category"),
                _file_name(row.text("image_source")),
                row.text("question"),
                row.yes("answer"),
                row.pictures,
            )
            for row in rows
        )
        return cls(_samples(asked), {**table.settings, "limit": limit})

    def asked_with(self, suffix: str) -> Pope:
        """The same questions with some words after each, as papers ask for one word."""
        samples = [replace(sample, prompt=f"{sample.prompt}{suffix}") for sample in self._samples]
        return Pope(samples, {**self.settings, "suffix": suffix}, self.max_new_tokens)

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        yes = says_yes(answer)
        field = ("tp" if yes else "fn") if sample.truth else ("fp" if yes else "tn")
        return {name: float(name == field) for name in self.fields}

    def right(self, record: Mapping[str, float]) -> bool:
        return bool(record["tp"] or record["tn"])

    def expected(self, sample: Sample) -> str:
        return "yes" if sample.truth else "no"


@dataclass(frozen=True)
class _Question:
    split: str
    image: str
    text: str
    truth: bool
    pictures: Callable[[], list[Any]]


def _samples(asked: Iterable[_Question]) -> list[Sample]:
    """One sample per question; those that several splits share are asked once."""
    samples: dict[tuple[str, str, str], Sample] = {}
    for question in asked:
        key = (question.image, question.text, "yes" if question.truth else "no")
        before = samples.get(key)
        samples[key] = Sample(
            id="/".join(key),
            image_id=question.image,
            condition="questions",
            splits=(*(before.splits if before else ()), question.split),
            prompt=question.text,
            images=question.pictures,
            truth=question.truth,
        )
    return list(samples.values())


def columns_of(files: Sequence[Path]) -> dict[Path, str]:
    """A column for each file: the split in its name, its name where files share a split, its path where they share the name."""
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


def _items(path: Path) -> list[Item]:
    return read_items(path, ("image", "text", "label"), "a POPE question")


def read_questions(path: Path) -> list[dict[str, str]]:
    """Questions of a POPE file; errors name file and line (or item, for an array)."""
    return [
        {"image": item.text("image"), "text": item.text("text"), "label": "yes" if item.yes("label") else "no"}
        for item in _items(path)
    ]
