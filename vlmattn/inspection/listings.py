"""Saved profiles, and what is different in two of them, as tables of text for a terminal or a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import isnan

import numpy as np

from vlmattn.inspection.differences import SHARE, HeadDifference, SinkDifference, Table
from vlmattn.interventions.profiles import HeadProfile, SinkProfile

Shown = HeadProfile | SinkProfile | HeadDifference | SinkDifference


@dataclass(frozen=True)
class Listing:
    """A table of text; the first cell of a row says what the row is about."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def listings(shown: Shown, top: int = 10) -> list[Listing]:
    """Tables about a profile or a difference; ``top`` heads in each. A head is written layer.head, both from 0."""
    if isinstance(shown, HeadProfile):
        tables = {name: np.array(table, dtype=float) for name, table in shown.scores.items()}
        best = {name: shown.top(name, 1.0)[:top] for name in tables}
        return [_heads("Heads with the highest scores", tables, best, "#.3g")]
    if isinstance(shown, HeadDifference):
        return _differences(shown, top)
    if isinstance(shown, SinkProfile):
        rows = (("dimensions", _numbers(shown.dims)), ("tau", f"{shown.tau:g}"), ("in layers", _span(shown)))
        return [Listing("Sinks", ("", ""), rows), *_levels({"": shown})]
    one, other = shown.first, shown.second
    compared = (
        ("dimensions in both", _numbers(shown.both), _numbers(shown.both)),
        ("dimensions only here", _numbers(shown.only_first), _numbers(shown.only_second)),
        ("tau", f"{one.tau:g}", f"{other.tau:g}"),
        ("in layers", _span(one), _span(other)),
    )
    return [Listing("Sinks", ("", "first", "second"), compared), *_levels({"first ": one, "second ": other})]


def _differences(shown: HeadDifference, top: int) -> list[Listing]:
    rows = [(name, _figure(found.spearman), _figure(found.overlap)) for name, found in shown.scores.items()]
    rows += [(name, "only in the first", "") for name in shown.only_first]
    rows += [(name, "only in the second", "") for name in shown.only_second]
    changes = {name: found.change for name, found in shown.scores.items()}
    most = {name: _largest(change, top) for name, change in changes.items()}
    return [
        Listing("Agreement", ("score", "Spearman", f"top {SHARE:.0%} in common"), tuple(rows)),
        _heads("Heads that changed most, second less first", changes, most, "+#.3g"),
    ]


def _heads(
    title: str, tables: Mapping[str, Table], places: Mapping[str, Sequence[tuple[int, int]]], style: str
) -> Listing:
    """A column for each score, a row for each rank."""
    columns = [
        [f"{n}.{h}  {table[n, h]:{style}}" for n, h in places[name]] if np.ptp(table) else ["all alike"]
        for name, table in tables.items()
    ]
    rows = tuple((str(rank), *cells) for rank, cells in enumerate(zip_longest(*columns, fillvalue=""), 1))
    return Listing(title, ("", *tables), rows)


def _largest(change: Table, count: int) -> list[tuple[int, int]]:
    order = np.argsort(-np.abs(change), axis=None, kind="stable")[:count]
    return [divmod(int(place), change.shape[1]) for place in order]


def _levels(profiles: Mapping[str, SinkProfile]) -> list[Listing]:
    """Sinks of each layer, for profiles that have them."""
    measured = {name: profile.levels for name, profile in profiles.items() if profile.levels}
    if not measured:
        return []
    columns = [f"{name}{kind}" for name in measured for kind in ("primary", "secondary")]
    layers = zip_longest(*measured.values(), fillvalue=(float("nan"),) * 2)
    rows = [(str(n), *(_figure(value) for level in found for value in level)) for n, found in enumerate(layers)]
    return [Listing("Mean number of sinks in a prompt", ("layer", *columns), tuple(rows))]


def _figure(value: float) -> str:
    return "-" if isnan(value) else f"{value:.2f}"


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def _span(profile: SinkProfile) -> str:
    start, stop = profile.layers
    return f"{start} to {stop - 1}" if stop > start else "none"
