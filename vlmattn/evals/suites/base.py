"""What a suite is: samples to ask, and how an answer becomes numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmattn.evals.stats import Metric


@dataclass(frozen=True)
class Sample:
    """One question about one or more images.

    Attributes:
        id: unique within the suite.
        image_id: the cluster of the bootstrap.
        condition: which data it belongs to ("faint", "clear", a file): one table each.
        splits: the columns it counts in; the questions that several splits share are asked once.
        prompt: what is asked.
        images: draw or read the pictures.
        truth: whatever the suite's ``score`` needs.
        image_count: how many pictures there are.
    """

    id: str
    image_id: str
    condition: str
    splits: tuple[str, ...]
    prompt: str
    images: Callable[[], list[Image.Image]]
    truth: Any
    image_count: int = 1


class Suite(ABC):
    """A named set of samples and its scores.

    Args:
        samples: always in the same order.
        settings: what is written with every result.
        max_new_tokens: length of the answers; None for the suite's own.
    """

    name: str
    title: str
    fields: tuple[str, ...]
    metrics: tuple[Metric, ...]
    max_new_tokens: int = 32
    #: Whether the figure over all splits is the mean of theirs, or one of all answers together.
    mean_of_splits: bool = False

    def __init__(
        self, samples: Iterable[Sample], settings: Mapping[str, Any], max_new_tokens: int | None = None
    ) -> None:
        self._samples, self.settings = list(samples), dict(settings)
        self.max_new_tokens = max_new_tokens or self.max_new_tokens

    @property
    def headline(self) -> Metric:
        """The metric of the chart and of the first column."""
        return self.metrics[0]

    def samples(self) -> Sequence[Sample]:
        """All samples, always in the same order."""
        return self._samples

    @abstractmethod
    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        """Values of ``fields`` for one answer."""

    def records(self, answers: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Values of ``fields`` by id for the samples that have an answer, in their order.

        A suite that scores questions in groups adds those fields here.
        """
        return {sample.id: self.score(sample, answers[sample.id]) for sample in self.samples() if sample.id in answers}

    def right(self, record: Mapping[str, float]) -> bool:
        """Whether an answer with this record counts as right (for McNemar's test and the examples)."""
        return bool(record["right"])

    def expected(self, sample: Sample) -> str:
        """The truth in words, for the report."""
        return str(sample.truth)
