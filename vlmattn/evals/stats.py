"""Figures from outcomes: ratios of sums, paired bootstrap over images, McNemar's test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Metric:
    """``scale * sum of the over-fields / sum of the under-fields``, 0 where the latter is 0.

    Every metric of the suites has this form, so a bootstrap only needs sums per image.
    """

    name: str
    over: Mapping[str, float]
    under: Mapping[str, float]
    about: str
    scale: float = 100.0
    better: str = "higher"  # "higher", "lower" or "" where neither is good
    label: str = ""

    @property
    def short(self) -> str:
        """Name for narrow tables."""
        return self.label or self.name

    def to_dict(self) -> dict[str, object]:
        """As it is written into summary.json."""
        return {"kind": type(self).__name__, **asdict(self)}

    def value(self, fields: Sequence[str], sums: Array) -> Array:
        """The metric for sums ``[..., fields]``."""
        over = sums @ np.array([self.over.get(name, 0.0) for name in fields])
        under = sums @ np.array([self.under.get(name, 0.0) for name in fields])
        return np.asarray(self.scale * np.divide(over, under, out=np.zeros_like(over), where=under != 0))


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in self.__dict__.items()}


class Bootstrap:
    """Resamples images, not questions: the questions about one image are not independent.

    All presets of a table share the resamples, so differences are paired.
    """

    def __init__(self, images: Sequence[str], seed: int = 0, resamples: int = RESAMPLES) -> None:
        self._names = sorted(set(images))
        place = {name: i for i, name in enumerate(self._names)}
        self._where = np.array([place[name] for name in images], dtype=np.int64)
        count = len(self._names)
        self._weights = (
            np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples).astype(float)
        )

    def _per_image(self, records: Array) -> Array:
        sums = np.zeros((len(self._names), records.shape[1]))
        np.add.at(sums, self._where, records)
        return sums

    def interval(self, metric: Metric, fields: Sequence[str], records: Array) -> Interval:
        """A metric of records ``[samples, fields]``."""
        return self.difference(metric, fields, records, None)

    def difference(self, metric: Metric, fields: Sequence[str], records: Array, base: Array | None) -> Interval:
        """A metric of ``records`` minus that of ``base`` (same samples in the same order)."""
        sums = self._per_image(records)
        value, drawn = metric.value(fields, sums.sum(0)), metric.value(fields, self._weights @ sums)
        if base is not None:
            sums = self._per_image(base)
            value = value - metric.value(fields, sums.sum(0))
            drawn = drawn - metric.value(fields, self._weights @ sums)
        low, high = np.percentile(drawn, [2.5, 97.5])
        return Interval(float(value), float(low), float(high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p-value that two answerers are right equally often, from the samples on which they differ."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    differing = only_first + only_second
    if differing == 0:
        return 1.0
    tail = sum(comb(differing, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << differing))
