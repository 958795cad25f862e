"""What is different in two profiles of one language model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlmattn.errors import InputError
from vlmattn.interventions.profiles import HeadProfile, SinkProfile

T = TypeVar("T")

SHARE = 0.05
"""Share of the heads whose overlap is told: the usual one to act on (``heads_*``)."""

Table = NDArray[np.float64]
"""A number for each head, ``[layers, heads]``."""


@dataclass(frozen=True, eq=False)
class ScoreDifference:
    """One score in two profiles.

    Attributes:
        change: second - first, ``[layers, heads]``.
        spearman: rank correlation over all heads, -1..1; equal scores share their mean rank.
        overlap: share of the top ``SHARE`` of the heads that both have in common, 0..1.

    Both are nan where one of the profiles gives all heads the same score, so that nothing is ranked.
    """

    change: Table
    spearman: float
    overlap: float


@dataclass(frozen=True, eq=False)
class HeadDifference:
    """Two head profiles: the scores that both have by name, and the names of those that only one has."""

    first: HeadProfile
    second: HeadProfile
    scores: dict[str, ScoreDifference]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class SinkDifference:
    """Two sink profiles, and the sink dimensions that both have, or only one."""

    first: SinkProfile
    second: SinkProfile
    both: tuple[int, ...]
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]


def compare_profiles(
    first: HeadProfile | SinkProfile, second: HeadProfile | SinkProfile
) -> HeadDifference | SinkDifference:
    """Compare two profiles of one kind and one language model.

    Raises:
        InputError: profiles of two kinds or two language models, head profiles without a common score.
    """
    if first.fingerprint != second.fingerprint:
        raise InputError(
            f"the profiles belong to two language models, '{first.source or 'unknown'}' ({first.fingerprint}) and"
            f" '{second.source or 'unknown'}' ({second.fingerprint}); only profiles of one can be compared, so look at"
            " each alone"
        )
    if isinstance(first, SinkProfile) and isinstance(second, SinkProfile):
        return SinkDifference(first, second, *_split(sorted(first.dims), sorted(second.dims)))
    if isinstance(first, SinkProfile) or isinstance(second, SinkProfile):
        raise InputError("one profile is of sinks and the other of heads; only profiles of one kind can be compared")
    both, only_first, only_second = _split(first.scores, second.scores)
    if not both:
        raise InputError(
            f"the profiles have no score in common: {', '.join(first.scores)} and {', '.join(second.scores)}; look at"
            " each alone"
        )
    scores = {name: _difference(first, second, name) for name in both}
    return HeadDifference(first, second, scores, only_first, only_second)


def _split(first: Collection[T], second: Collection[T]) -> tuple[tuple[T, ...], tuple[T, ...], tuple[T, ...]]:
    """What both hold, and what only one does, in their order."""
    both = tuple(item for item in first if item in second)
    only_first, only_second = (tuple(item for item in of if item not in both) for of in (first, second))
    return both, only_first, only_second


def _difference(first: HeadProfile, second: HeadProfile, score: str) -> ScoreDifference:
    one, other = np.array(first.scores[score], dtype=float), np.array(second.scores[score], dtype=float)
    if one.shape != other.shape:
        raise InputError(
            f"the profiles have '{score}' for {one.shape} and {other.shape} layers and heads; measure it again"
        )
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return ScoreDifference(other - one, float("nan"), float("nan"))
    top = [set(profile.top(score, SHARE)) for profile in (first, second)]
    spearman = np.corrcoef(_ranks(one), _ranks(other))[0, 1]
    return ScoreDifference(other - one, float(spearman), len(top[0] & top[1]) / len(top[0]))


def _ranks(table: Any) -> Table:
    """Rank of each number, from 1; equal ones share the mean of theirs."""
    _, place, counts = np.unique(table.ravel(), return_inverse=True, return_counts=True)
    ranks: Table = (counts.cumsum() - (counts - 1) / 2)[place.ravel()]
    return ranks
