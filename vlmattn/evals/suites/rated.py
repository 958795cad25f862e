"""Suites of free text that a judge rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmattn.evals.judges import Judge, Ratings, Verdict
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite

HALLUCINATIONS = Metric(
    "hallucinations",
    {"hallucinated": 1},
    {"asked": 1},
    "answers with a hallucination, says the judge",
    better="lower",
    label="halluc.",
)


@dataclass(frozen=True)
class Key:
    """The truth of a sample: a right answer, and what is known to be in the image."""

    reference: str
    known: tuple[str, ...]


class Rated(Suite):
    """Answers that a judge rates, each asked for once. An answer is right if the judge finds no hallucination in it.

    Args:
        judge: who rates, as ``load_judge`` takes it; the papers ask GPT-4.
    """

    def __init__(
        self, samples: Iterable[Sample], settings: Mapping[str, Any], judge: Judge | str, max_new_tokens: int
    ) -> None:
        self._ratings = Ratings(judge)
        more = {"max_new_tokens": max_new_tokens, "judge": self._ratings.name}
        super().__init__(samples, {**settings, **more}, max_new_tokens)

    def rated(self, sample: Sample, answer: str) -> Verdict:
        """What the judge says of an answer."""
        key: Key = sample.truth
        return self._ratings.of(sample.id, sample.prompt, key.reference, key.known, answer)

    def right(self, record: Mapping[str, float]) -> bool:
        return not record["hallucinated"]

    def expected(self, sample: Sample) -> str:
        return str(sample.truth.reference)
