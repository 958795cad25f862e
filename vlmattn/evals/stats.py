"""Figures from outcomes: ratios of sums, paired bootstrap over images, McNemar's test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb, isnan, nan

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000
FEWEST = 10  # images; the percentiles of a bootstrap over fewer are far too narrow
_LEVEL = 0.05  # of the 95 % intervals


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

    @property
    def is_share(self) -> bool:
        """Whether it counts some of what it divides by, each once: 0 to ``scale``."""
        return set(self.over) < set(self.under) and {*self.over.values(), *self.under.values()} == {1}

    def value(self, fields: Sequence[str], sums: Array) -> Array:
        """The metric for sums ``[..., fields]``."""
        over = sums @ np.array([self.over.get(name, 0.0) for name in fields])
        under = sums @ np.array([self.under.get(name, 0.0) for name in fields])
        return np.asarray(self.scale * np.divide(over, under, out=np.zeros_like(over), where=under != 0))


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; ``low`` and ``high`` are NaN where the data cannot say how sure the value is."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Rounded, with None for NaN."""
        return {name: None if isnan(value) else round(value, 4) for name, value in self.__dict__.items()}


class Bootstrap:
    """Resamples images, not questions: the questions about one image are not independent.

    All presets of a table share the resamples, so differences are paired. There is no interval from fewer than
    ``FEWEST`` images that have something to count, nor where all images agree and every resample is the same; but a
    share of 0 or of everything has the exact interval of Clopper and Pearson, with the images as its trials.

    Args:
        images: of each record.
        seed, resamples: of the draws.
        parts: of each record; figures are means over the figures of the parts. None: all records are one.
    """

    def __init__(
        self, images: Sequence[str], seed: int = 0, resamples: int = RESAMPLES, parts: Sequence[str] | None = None
    ) -> None:
        self._count, self._image = _numbered(images)
        self._parts, self._part = _numbered(parts if parts is not None else [""] * len(images))
        shares = np.full(self._count, 1 / self._count)
        self._weights = np.random.default_rng(seed).multinomial(self._count, shares, resamples).astype(float)

    def _per_image(self, records: Array) -> Array:
        """Sums ``[parts, images, fields]``."""
        sums = np.zeros((self._parts, self._count, records.shape[1]))
        np.add.at(sums, (self._part, self._image), records)
        return sums

    def interval(self, metric: Metric, fields: Sequence[str], records: Array) -> Interval:
        """A metric of records ``[samples, fields]``."""
        return self.difference(metric, fields, records, None)

    def difference(self, metric: Metric, fields: Sequence[str], records: Array, base: Array | None) -> Interval:
        """A metric of ``records`` minus that of ``base`` (same samples in the same order)."""
        sums = self._per_image(records)
        value, drawn = self._figures(metric, fields, sums)
        telling = _telling(metric, fields, sums)
        if base is not None:
            sums = self._per_image(base)
            less, less_drawn = self._figures(metric, fields, sums)
            value, drawn, telling = value - less, drawn - less_drawn, min(telling, _telling(metric, fields, sums))
        if telling < FEWEST:
            return Interval(value, nan, nan)
        low, high = (float(end) for end in np.percentile(drawn, [50 * _LEVEL, 100 - 50 * _LEVEL]))
        if high - low > 1e-9 * metric.scale:
            return Interval(value, low, high)
        return _exact(metric, value, telling) if base is None else Interval(value, nan, nan)

    def _figures(self, metric: Metric, fields: Sequence[str], sums: Array) -> tuple[float, Array]:
        """A metric of all images, and of every resample."""
        return (float(metric.value(fields, sums.sum(1)).mean()), metric.value(fields, self._weights @ sums).mean(0))


def _numbered(names: Sequence[str]) -> tuple[int, NDArray[np.int64]]:
    """How many different names there are, and the number of each."""
    place = {name: number for number, name in enumerate(sorted(set(names)))}
    return len(place), np.array([place[name] for name in names], dtype=np.int64)


def _telling(metric: Metric, fields: Sequence[str], sums: Array) -> int:
    """How many images have something to count, in the part with the fewest; ``sums`` is ``[parts, images, fields]``."""
    if not metric.under:
        return int(sums.shape[1])
    under = sums @ np.array([metric.under.get(name, 0.0) for name in fields])
    return int((under != 0).sum(1).min())


def _exact(metric: Metric, value: float, trials: int) -> Interval:
    """A share on which all images agree: the interval of Clopper and Pearson where it is 0 or everything."""
    least = (_LEVEL / 2) ** (1 / trials)
    if metric.is_share and value == metric.scale:
        return Interval(value, metric.scale * least, metric.scale)
    if metric.is_share and value == 0:
        return Interval(value, 0.0, metric.scale * (1 - least))
    return Interval(value, nan, nan)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p-value that two answerers are right equally often, from the samples on which they differ."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    differing = only_first + only_second
    if differing == 0:
        return 1.0
    tail = sum(comb(differing, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << differing))
