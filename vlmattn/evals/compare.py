"""Two runs side by side: the same questions, answered by two models, versions or settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from vlmattn.errors import InputError, OptionError
from vlmattn.evals.report.tables import verdict
from vlmattn.evals.scoring import SEED
from vlmattn.evals.stats import Bootstrap, Interval, Metric, mcnemar
from vlmattn.evals.suites.captions import CorpusBleu
from vlmattn.texts import lines_of, parse_json, read_json, read_text

_KINDS: Mapping[str, type[Metric]] = {kind.__name__: kind for kind in (Metric, CorpusBleu)}
_APART = (
    "model", "weights", "config", "attention", "processor", "files", "dtype", "quantisation", "batch_size",
    "batch_tokens", "versions", "libraries", "hardware", "suites", "questions", "decoding",
)  # fmt: skip
_AGAIN = "run vlmattn eval again, it keeps the answers"
_TEXTS = ("suite", "preset", "id", "image", "condition", "prompt", "expected", "answer")
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
        """ "better" or "worse" where there is an interval and it leaves out 0, else ""."""
        return verdict({"difference": self.difference.to_dict()}, self.better)


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
    runs = [read(folder) for folder in (first, second)]
    summaries, lines = [summary for summary, _ in runs], [own for _, own in runs]
    metrics = _metrics(summaries[0])
    means = summaries[0].get("mean_of_splits", {})  # missing in runs of earlier versions
    rows: list[Compared] = []
    kept: list[tuple[Line, Line]] = []
    for one, other in _pairs(summaries, (first, second), pairs):
        label = one if one == other else f"{one} → {other}"
        for (suite, condition), both in _matched(lines, one, other).items():
            if suite not in metrics:
                raise InputError(f"{first / 'summary.json'}: no metrics of suite {suite}; {_AGAIN}")
            rows += _rows(suite, condition, label, both, metrics[suite], bool(means.get(suite)))
            kept += [pair for pair in both if pair[0]["right"] != pair[1]["right"]]
    if not rows:
        raise InputError(f"{first} and {second} have no question in common; compare runs on the same suites and data")
    asked = [{(suite, key) for suite, _, key in own} for own in lines]
    only = (len(asked[0] - asked[1]), len(asked[1] - asked[0]))
    return Comparison(tuple(rows), _differing(*summaries), only, tuple(kept[:examples]))


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is set differently, by name."""
    told = {name: (first.get(name), second.get(name)) for name in _APART}
    return {name: both for name, both in told.items() if both[0] != both[1]}


def _matched(
    lines: Sequence[Mapping[tuple[str, str, str], Line]], one: str, other: str
) -> dict[tuple[str, str], list[tuple[Line, Line]]]:
    """By suite and condition: the answers of two presets, one of each run, to the same questions."""
    groups: dict[tuple[str, str], list[tuple[Line, Line]]] = {}
    for (suite, preset, key), line in lines[0].items():
        match = lines[1].get((suite, other, key))
        if preset == one and match is not None and match["prompt"] == line["prompt"]:
            groups.setdefault((suite, line["condition"]), []).append((line, match))
    return groups


def read(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, str, str], Line]]:
    """The summary of a finished run, and its answers by suite, preset and id.

    Raises:
        InputError: there is none, or a file is damaged (file:line).
    """
    if not all((folder / name).is_file() for name in ("summary.json", "answers.jsonl")):
        raise InputError(f"{folder} holds no finished run; run vlmattn eval --out {folder} to its end first")
    try:
        summary, lines = read_json(folder / "summary.json"), lines_of(read_text(folder / "answers.jsonl"))
    except InputError as error:
        raise InputError(f"{error}; {_AGAIN}") from None
    if not isinstance(summary, dict) or not all(
        isinstance(summary.get(name, {}), dict) for name in ("recipes", "metrics", "mean_of_splits")
    ):
        raise InputError(f"{folder / 'summary.json'}: not the summary of a run; {_AGAIN}")
    found: dict[tuple[str, str, str], Line] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        item = _parsed(line)
        if item is None:
            raise InputError(f"{folder / 'answers.jsonl'}:{number}: damaged line; {_AGAIN}")
        key = item["suite"], item["preset"], item["id"]
        if key in found:
            raise InputError(f"{folder / 'answers.jsonl'}:{number}: a second answer to one question; {_AGAIN}")
        found[key] = item
    return summary, found


def _parsed(text: str) -> Line | None:
    """A line of answers.jsonl, None if it lacks what is compared."""
    try:
        item = parse_json(text, "answers.jsonl")
    except InputError:
        return None
    if not isinstance(item, dict) or not all(isinstance(item.get(name), str) for name in _TEXTS):
        return None
    scores, splits = item.get("scores"), item.get("splits")
    whole = (
        isinstance(item.get("right"), bool)
        and isinstance(splits, list)
        and len(splits) > 0
        and all(isinstance(split, str) for split in splits)
        and isinstance(scores, dict)
        and all(isinstance(score, (int, float)) for score in scores.values())
    )
    return item if whole else None


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


def _metrics(summary: Mapping[str, Any]) -> dict[str, list[Metric]]:
    """The metrics of each suite of a run."""
    return {name: [_metric(each) for each in found] for name, found in summary["metrics"].items()}


def _metric(told: Any) -> Metric:
    try:
        kind = _KINDS[told["kind"]]
        given = {field.name: told[field.name] for field in fields(kind)}
        return kind(**{**given, "over": dict(given["over"]), "under": dict(given["under"])})
    except (KeyError, TypeError, ValueError):
        raise InputError(f"the runs were made by another version of vlmattn; {_AGAIN}") from None


def _scores(line: Line, names: Sequence[str]) -> list[float]:
    return [line["scores"][name] for name in names]


def _rows(
    suite: str,
    condition: str,
    presets: str,
    both: Sequence[tuple[Line, Line]],
    metrics: Sequence[Metric],
    mean_of_splits: bool,
) -> list[Compared]:
    """Every metric, over the splits as in the runs' own overall figures."""
    repeated = [(pair, split if mean_of_splits else "") for pair in both for split in pair[0]["splits"]]
    names = list(both[0][0]["scores"])
    if not all(line["scores"].keys() == set(names) for line in itertools.chain(*both)):
        raise InputError(
            f"suite {suite}: the answers of the runs have different scores; run vlmattn eval again on both"
        )
    bootstrap = Bootstrap([pair[0]["image"] for pair, _ in repeated], seed=SEED, parts=[part for _, part in repeated])
    one, other = (np.array([_scores(pair[side], names) for pair, _ in repeated]) for side in (0, 1))
    p = mcnemar([pair[0]["right"] for pair in both], [pair[1]["right"] for pair in both])
    changed = sum(pair[0]["answer"] != pair[1]["answer"] for pair in both)
    return [
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
        for metric in metrics
    ]
