"""From answers to figures: one table per condition and split, and one line per answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlmattn.evals.stats import Bootstrap, mcnemar
from vlmattn.evals.suites.base import Sample, Suite

SEED = 0  # of the bootstrap
Answers = Mapping[tuple[str, str, str], str]  # by suite, preset, sample id
Table = dict[str, Any]


class Scored:
    """The scores of a suite's answers by several presets; samples without an answer of every preset are left out.

    Args:
        answers: by suite, preset and sample.

    Attributes:
        samples: those that count.
    """

    def __init__(self, suite: Suite, presets: Sequence[str], answers: Answers) -> None:
        self._suite, self._presets, self._answers = suite, presets, answers
        self.samples: list[Sample] = [
            sample
            for sample in suite.samples()
            if all((suite.name, preset, sample.id) in answers for preset in presets)
        ]
        self._records = {
            preset: suite.records({sample.id: answers[suite.name, preset, sample.id] for sample in self.samples})
            for preset in presets
        }

    def tables(self) -> tuple[list[Table], list[Table]]:
        """One table per condition and split, and one per condition over all of its splits.

        The latter is the mean of the figures of the splits for suites that say so (POPE, as papers report it); for
        others it counts all answers together, each once for every split it belongs to.
        """
        columns: dict[tuple[str, str], list[Sample]] = {}
        for sample in self.samples:
            for split in sample.splits:
                columns.setdefault((sample.condition, split), []).append(sample)
        whole: dict[str, list[tuple[Sample, str]]] = {}
        for (condition, split), members in columns.items():
            part = split if self._suite.mean_of_splits else ""
            whole.setdefault(condition, []).extend((sample, part) for sample in members)
        return (
            [self._table(condition, split, [(s, "") for s in of]) for (condition, split), of in columns.items()],
            [self._table(condition, "all", members) for condition, members in whole.items()],
        )

    def _table(self, condition: str, split: str, counted: Sequence[tuple[Sample, str]]) -> Table:
        members = [sample for sample, _ in counted]
        count, images = len({sample.id for sample in members}), len({sample.image_id for sample in members})
        facts = {"suite": self._suite.name, "condition": condition, "split": split, "samples": count, "images": images}
        return {**facts, "rows": self._rows(members, [part for _, part in counted])}

    def _rows(self, members: Sequence[Sample], parts: Sequence[str]) -> dict[str, Any]:
        """Every metric of every preset over some samples, as a mean over their parts, and its difference to ``none``.

        A sample may count repeatedly.
        """
        suite, records = self._suite, self._records
        bootstrap = Bootstrap([sample.image_id for sample in members], seed=SEED, parts=parts)
        matrix = {p: np.array([[of[s.id][f] for f in suite.fields] for s in members]) for p, of in records.items()}
        once = list({sample.id: sample for sample in members})
        rows = {}
        for preset in self._presets:
            cells = {}
            for metric in suite.metrics:
                cell: dict[str, Any] = bootstrap.interval(metric, suite.fields, matrix[preset]).to_dict()
                if preset != "none":
                    change = bootstrap.difference(metric, suite.fields, matrix[preset], matrix["none"])
                    cell["difference"] = change.to_dict()
                cells[metric.name] = cell
            row: dict[str, Any] = {"metrics": cells}
            if preset != "none":
                right = {p: [suite.right(records[p][key]) for key in once] for p in ("none", preset)}
                row["mcnemar_p"] = mcnemar(right["none"], right[preset])
                row["changed"] = sum(self._answer("none", key) != self._answer(preset, key) for key in once)
            rows[preset] = row
        return rows

    def _answer(self, preset: str, key: str) -> str:
        return self._answers[self._suite.name, preset, key]

    def right(self, preset: str, sample: Sample) -> bool:
        """Whether the preset's answer to a sample counts as right."""
        return self._suite.right(self._records[preset][sample.id])

    def lines(self) -> Iterator[dict[str, Any]]:
        """One entry per preset and sample: what was asked, what is true, what was said, and how it was scored."""
        for preset in self._presets:
            for sample in self.samples:
                yield {
                    "suite": self._suite.name,
                    "preset": preset,
                    "id": sample.id,
                    "image": sample.image_id,
                    "condition": sample.condition,
                    "splits": list(sample.splits),
                    "prompt": sample.prompt,
                    "expected": self._suite.expected(sample),
                    "answer": self._answer(preset, sample.id),
                    "right": self.right(preset, sample),
                    "scores": {field: self._records[preset][sample.id][field] for field in self._suite.fields},
                }
