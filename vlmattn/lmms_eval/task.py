"""Our suites as tasks of lmms-eval: it asks and writes down, the suite scores."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from vlmattn.evals.scoring import Scored
from vlmattn.evals.suites.base import Suite
from vlmattn.lmms_eval.sources import make_suite

_SPLIT = "test"
_DEFAULTS = {
    "test_split": _SPLIT,
    "output_type": "generate_until",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "cluster_key": "image",
    "generation_kwargs": {"do_sample": False, "until": []},
}


class SuiteTask(ConfigurableMessagesTask):
    """A suite of ``vlmattn.evals`` as a task for chat models; a YAML file names the suite in ``dataset_kwargs``.

    Every metric comes as a fraction over all splits (``accuracy``; for POPE the mean over splits, a question that
    several share counts in each) and for each split (``accuracy_random``), with the values that ``vlmattn eval`` finds
    for the same answers. ``score`` is the share of right answers, each question once: lmms-eval finds its standard
    error over images, and compares it in pairs (``--baseline``).
    """

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        given = {key: value for key, value in (config or {}).items() if key != "class"}
        super().__init__(config={**_DEFAULTS, **given}, **options)
        self._figures: tuple[dict[str, str], dict[str, float]] = ({}, {})
        self._names = offered(self.suite)
        self._aggregation_list = {"score": _mean, **{name: partial(self._figure, name) for name in self._names}}
        better = {"score": "higher", **self._names}
        self._higher_is_better = {name: {"higher": True, "lower": False}.get(word) for name, word in better.items()}
        self._metric_fn_list = dict.fromkeys(better)
        self._metric_fn_kwargs: dict[str, dict[str, Any]] = {name: {} for name in better}

    def _prepare_metric_and_aggregation(self) -> None:
        """Nothing yet: they follow from the suite."""

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Make the suite; its pictures are drawn or read when a question is asked."""
        self.suite = make_suite(**(dataset_kwargs or {}))
        self._samples = {sample.id: sample for sample in self.suite.samples()}
        docs = Dataset.from_list(
            [
                {
                    "id": sample.id,
                    "image_id": sample.image_id,
                    "condition": sample.condition,
                    "splits": list(sample.splits),
                    "question": sample.prompt,
                    "answer": self.suite.expected(sample),
                }
                for sample in self.suite.samples()
            ]
        )
        self.dataset = self.dataset_no_image = DatasetDict({_SPLIT: docs})
        settings = {"max_new_tokens": self.suite.max_new_tokens, **self.config.generation_kwargs}
        self.config.generation_kwargs = settings
        # The response cache tells tasks apart by their config alone, so what was asked must be in it.
        asked = hashlib.sha256(repr([sorted(doc.items()) for doc in docs]).encode()).hexdigest()[:16]
        self.config.dataset_kwargs = {**(dataset_kwargs or {}), "asked": asked, "of": dict(self.suite.settings)}

    def doc_to_visual(self, doc: Mapping[str, Any]) -> list[Image.Image]:
        return self._samples[doc["id"]].images()

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str], full_docs: Any = None) -> dict[str, Any]:
        """The answer for every metric (all need all answers), and whether it is right."""
        sample, answer = self._samples[doc["id"]], results[0].strip()
        right = self.suite.right(self.suite.records({sample.id: answer})[sample.id])
        score = {"score": float(right), "id": sample.id, "image": sample.image_id}
        return {"score": score, **dict.fromkeys(self._names, (sample.id, answer))}

    def _figure(self, name: str, items: Sequence[tuple[str, str]]) -> float:
        answers = dict(items)
        if self._figures[0] != answers:  # the same answers come once for every metric
            self._figures = (answers, figures(self.suite, answers))
        return self._figures[1].get(name, float("nan"))  # nothing of this split was asked


def _mean(items: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(item["score"] for item in items) / len(items))


def figures(suite: Suite, answers: Mapping[str, str]) -> dict[str, float]:
    """Every metric of a suite as a fraction, over all splits and for each, from answers by id."""
    by_split, overall = Scored(
        suite, ["none"], {(suite.name, "none", id): text for id, text in answers.items()}
    ).tables()
    several = len({sample.condition for sample in suite.samples()}) > 1
    found = {}
    for table in (*overall, *by_split):
        for metric, cell in table["rows"]["none"]["metrics"].items():
            found[_name(metric, table["condition"] if several else "", table["split"])] = round(cell["value"] / 100, 6)
    return found


def offered(suite: Suite) -> dict[str, str]:
    """Names of the metrics, and which direction is better; those that count nothing in a split are left out there."""
    records = suite.records({sample.id: suite.expected(sample) for sample in suite.samples()})
    several = len({sample.condition for sample in suite.samples()}) > 1
    found = {}
    for sample in suite.samples():
        for split in ("all", *sample.splits):
            for metric in suite.metrics:
                if any(records[sample.id][field] for field in metric.under):
                    found[_name(metric.name, sample.condition if several else "", split)] = metric.better
    return dict(sorted(found.items()))


def _name(metric: str, condition: str, split: str) -> str:
    """``accuracy``, ``accuracy_random``, ``accuracy_faint_random``: lmms-eval allows no commas."""
    words = [metric, condition, "" if split == "all" else split]
    return "_".join(re.sub(r"\W+", "_", word) for word in words if word)
