"""Two runs side by side: the same questions, answered by two models, versions or settings; paired statistics over images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from vlmattn.errors import InputError, OptionError
from vlmattn.evals.scoring import SEED
from vlmattn.evals.stats import Bootstrap, Interval, Metric, mcnemar
from vlmattn.evals.suites.captions import CorpusBleu

_KINDS: Mapping[str, type[Metric]] = {kind.__name__: kind for kind in (Metric, CorpusBleu)}
_APART = (
    "model",
    "weights",
    "dtype",
    "quantisation",
    "batch_size",
    "batch_tokens",
    "versions",
    "hardware",
    "suites",
    "decoding",
)
Line = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """One metric of one preset on one suite's condition, in both runs.

    Attributes:
        first, second: values in the runs.
        difference: second minus first, with its 95 % interval.
        p: McNemar's, on right and wrong answers.
        questions: that both runs answered.
        changed: answers that differ.
    """

    suite: str
    condition: str
    presets: str
    metric: str
    better: str
    first: float
    second: float
    difference: Interval
    p: float
    questions: int
    changed: int

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the interval leaves out 0, else ""."""
        if not self.better or self.difference.low <= 0 <= self.difference.high:
            return ""
        return "better" if (self.difference.value > 0) == (self.better == "higher") else "worse"


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
        rows: every metric of every suite, condition and pair of presets; the first one of a suite is its headline.
        settings: what is set differently, by name: both values.
        only: questions that one run has and the other has not, by run.
        changed: pairs of answers to one question of which one is right, the first ones.
    """

    rows: tuple[Compared, ...]
    settings: Mapping[str, tuple[Any, Any]]
    only: tuple[int, int]
    changed: tuple[tuple[Line, Line], ...]


def compare(
    first: Path, second: Path, pairs: Sequence[tuple[str, str]] | None = None, examples: int = 20
) -> Comparison:
    """Compare two results folders of ``vlmattn eval`` on the questions that both have answered.

    Args:
        pairs: (preset of the first run, preset of the second); default the presets that both have.
        examples: at most so many pairs of answers are kept.

    Raises:
        InputError: a folder without a finished run, or runs without a question in common.
        OptionError: a preset that the run does not have.
    """
    summaries, lines = [], []
    for folder in (first, second):
        summary, own = read(folder)
        summaries.append(summary)
        lines.append(own)
    chosen = _pairs(summaries, (first, second), pairs)
    metrics = {name: [_metric(each) for each in found] for name, found in summaries[0]["metrics"].items()}
    rows: list[Compared] = []
    kept: list[tuple[Line, Line]] = []
    asked: list[set[tuple[str, str]]] = [{(suite, key) for suite, _, key in own} for own in lines]
    for one, other in chosen:
        groups: dict[tuple[str, str], list[tuple[Line, Line]]] = {}
        for (suite, preset, key), line in lines[0].items():
            match = lines[1].get((suite, other, key))
            if preset == one and match is not None and match["prompt"] == line["prompt"]:
                groups.setdefault((suite, line["condition"]), []).append((line, match))
        label = one if one == other else f"{one} → {other}"
        for (suite, condition), both in groups.items():
            rows += _rows(suite, condition, label, both, metrics[suite])
            kept += [pair for pair in both if pair[0]["right"] != pair[1]["right"]]
    if not rows:
        raise InputError(f"{first} and {second} have no question in common; compare runs on the same suites and data")
    differing = {
        name: (summaries[0].get(name), summaries[1].get(name))
        for name in _APART
        if summaries[0].get(name) != summaries[1].get(name)
    }
    only = (len(asked[0] - asked[1]), len(asked[1] - asked[0]))
    return Comparison(tuple(rows), differing, only, tuple(kept[:examples]))


def read(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, str, str], Line]]:
    """The summary of a finished run, and its answers by suite, preset and id.

    Raises:
        InputError: there is none, or a line is damaged (file:line).
    """
    try:
        summary = json.loads((folder / "summary.json").read_text())
        text = (folder / "answers.jsonl").read_text()
    except (OSError, ValueError):
        raise InputError(f"{folder} holds no finished run; run vlmattn eval --out {folder} to its end first") from None
    found: dict[tuple[str, str, str], Line] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            item = json.loads(line)
            found[item["suite"], item["preset"], item["id"]] = item
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{folder / 'answers.jsonl'}:{number}: damaged line; run vlmattn eval again, it keeps the answers"
            ) from None
    return summary, found


def _pairs(
    summaries: Sequence[dict[str, Any]], folders: Sequence[Path], pairs: Sequence[tuple[str, str]] | None
) -> list[tuple[str, str]]:
    known = [list(summary["recipes"]) for summary in summaries]
    if pairs is None:
        return [(name, name) for name in known[0] if name in known[1]]
    for names in pairs:
        for name, own, folder in zip(names, known, folders, strict=True):
            if name not in own:
                raise OptionError(f"{folder} has no preset '{name}'; it has {', '.join(own)}")
    return list(pairs)


def _metric(told: Mapping[str, Any]) -> Metric:
    try:
        kind = _KINDS[told["kind"]]
        return kind(**{field.name: told[field.name] for field in fields(kind)})
    except KeyError:
        raise InputError(
            "the runs were made by another version of vlmattn; run vlmattn eval again, it keeps the answers"
        ) from None


def _rows(
    suite: str, condition: str, presets: str, both: Sequence[tuple[Line, Line]], metrics: Sequence[Metric]
) -> list[Compared]:
    """Every metric; a question counts once for each of its splits, as in the runs' own overall figures."""
    repeated = [pair for pair in both for _ in pair[0]["splits"]]
    names = list(both[0][0]["scores"])
    bootstrap = Bootstrap([pair[0]["image"] for pair in repeated], seed=SEED)
    one, other = (np.array([[pair[side]["scores"][name] for name in names] for pair in repeated]) for side in (0, 1))
    p = mcnemar([pair[0]["right"] for pair in both], [pair[1]["right"] for pair in both])
    changed = sum(pair[0]["answer"] != pair[1]["answer"] for pair in both)
    found = []
    for metric in metrics:
        found.append(
            Compared(
                suite=suite,
                condition=condition,
                presets=presets,
                metric=metric.name,
                better=metric.better,
                first=bootstrap.interval(metric, names, one).value,
                second=bootstrap.interval(metric, names, other).value,
                difference=bootstrap.difference(metric, names, other, one),
                p=p,
                questions=len(both),
                changed=changed,
            )
        )
    return found
