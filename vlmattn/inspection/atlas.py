"""Saved profiles of heads and sinks, and what is different in two of them: figures, and one page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmattn import pages
from vlmattn.inspection.differences import SHARE, HeadDifference, Table
from vlmattn.inspection.listings import Listing, Shown, listings
from vlmattn.interventions.profiles import HeadProfile, SinkProfile

MEANING = {
    "vhd": "how far the image moves the head's output at the last prompt row (arXiv 2412.13949)",
    "visual": "attention of the last prompt row on the image, 0 to 1",
    "retrieval": "share of answer tokens that stand in the prompt where the head looks most (arXiv 2404.15574)",
    "needle": "how often the head looks at the image that holds the answer: 0 by chance, 1 always",
    "causal": "how far the choice between what image and text say moves when the head is replaced",
    "importance": "log-probability (nats) that answer tokens lose when the head is replaced; below 0 it is in the way",
}
"""What the scores of this library mean."""

_WIDTH = 3.5  # inches: 336 pixels, so that text keeps its size on a phone and three stand beside each other on a desk
_MARKS = 0.8  # side of the frame around a head, in cells


def page(shown: Shown, title: str, top: int = 10) -> str:
    """An HTML page that needs nothing from elsewhere: what was measured, figures, tables.

    Args:
        title: names the profile, or both.
        top: heads in a table.
    """
    if isinstance(shown, (HeadProfile, SinkProfile)):
        facts = f"<p>{_facts(shown)}</p>"
    else:
        facts = f"<p><b>first</b>: {_facts(shown.first)}</p><p><b>second</b>: {_facts(shown.second)}</p>"
    drawn = "".join(map(pages.figure, figures(shown).values()))
    tables = "".join(map(_table, listings(shown, top)))
    heading = f"<h1 style='overflow-wrap:anywhere'>{html.escape(title)}</h1>"
    body = f"{heading}{facts}<div class='panels'>{drawn}</div>{_legend(shown)}{tables}"
    return pages.document(f"vlmattn profile: {title}", body)


def figures(shown: Shown) -> dict[str, Any]:
    """Matplotlib figures by name: a map of each score (layers x heads), or counted sinks of each layer.

    Colours begin at 0 for scores that are never negative; for others, and for differences, 0 is white in the middle.
    """
    if isinstance(shown, HeadProfile):
        tables = {name: np.array(table, dtype=float) for name, table in shown.scores.items()}
        marked = {name: shown.top(name, SHARE) if np.ptp(table) else () for name, table in tables.items()}
        return {name: _heads(table, name, marked[name]) for name, table in tables.items()}
    if isinstance(shown, HeadDifference):
        return {
            f"{name}-difference": _heads(found.change, f"{name}, second less first", (), signed=True)
            for name, found in shown.scores.items()
        }
    sinks = {"": shown} if isinstance(shown, SinkProfile) else {"first": shown.first, "second": shown.second}
    return {"sinks": _sinks(sinks)} if any(profile.levels for profile in sinks.values()) else {}


def _heads(table: Table, title: str, marked: Sequence[tuple[int, int]], signed: bool = False) -> Any:
    """A map of all heads, with frames around some."""
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    from vlmattn.drawing import Figure

    layers, heads = table.shape
    finite = table[np.isfinite(table)]
    highest = float(np.abs(finite).max(initial=0)) or 1.0
    signed = signed or bool((finite < 0).any())
    drawn = Figure(figsize=(_WIDTH, min(max(_WIDTH * layers / heads, 2.4), 5.5)), layout="constrained")
    axis = drawn.subplots()
    colours: dict[str, Any] = {"cmap": "PuOr", "vmin": -highest} if signed else {"cmap": "cividis", "vmin": 0}
    seen = axis.imshow(table, origin="lower", aspect="auto", interpolation="none", vmax=highest, **colours)
    width = min(1.2, 24 / max(layers, heads))  # of a frame, in points: small cells keep their colour
    for layer, head in marked:
        corner = (head - _MARKS / 2, layer - _MARKS / 2)
        frame = Rectangle(corner, _MARKS, _MARKS, fill=False, lw=width, edgecolor="black" if signed else "white")
        axis.add_patch(frame)
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    drawn.colorbar(seen, cax=axis.inset_axes((1.02, 0, 0.05, 1))).outline.set_visible(False)
    return drawn


def _sinks(profiles: Mapping[str, SinkProfile]) -> Any:
    """Primary and secondary sinks of each layer; the layers that sinks enter are shaded. A panel for each profile."""
    from matplotlib.ticker import MaxNLocator

    from vlmattn.drawing import Figure

    drawn = Figure(figsize=(_WIDTH, 0.6 + 2.0 * len(profiles)), layout="constrained")
    axes = drawn.subplots(len(profiles), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (name, profile) in zip(axes, profiles.items(), strict=True):
        start, stop = profile.layers
        if stop > start:
            axis.axvspan(start - 0.5, stop - 0.5, color="#eeeeee", zorder=0)
        counts = np.array(profile.levels, dtype=float).reshape(-1, 2)
        below = np.zeros(len(counts))
        for kind, values, colour in zip(("primary", "secondary"), counts.T, pages.COLOURS[1:], strict=False):
            axis.bar(range(len(values)), values, 0.8, bottom=below, color=colour, label=kind)
            below = below + values
        axis.set_title(name, loc="left", fontsize=11)
        axis.set_ylabel("sinks in a prompt")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("layer")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return drawn


def _facts(profile: HeadProfile | SinkProfile) -> str:
    """Where a profile comes from, as HTML."""
    asked = f"{len(profile.prompts)} kinds of prompts" if profile.prompts else "prompts not recorded"
    source = html.escape(profile.source or "unknown")
    return f"measured on {source} ({html.escape(profile.fingerprint)}), {asked}, seed {profile.seed}"


def _legend(shown: Shown) -> str:
    if not isinstance(shown, (HeadProfile, HeadDifference)):
        return "<p><small>Grey: the layers that sinks enter.</small></p>"
    known = "".join(f"<li><b>{name}</b>: {MEANING[name]}</li>" for name in shown.scores if name in MEANING)
    frames = f" Frames: the top {SHARE:.0%}." if isinstance(shown, HeadProfile) else ""
    return f"<ul>{known}</ul><p>Heads are written layer.head, both from 0.{frames}</p>"


def _table(listing: Listing) -> str:
    first, *others = map(html.escape, listing.columns)
    head = f"<tr><th style='text-align:left'>{first}</th>{''.join(f'<th>{column}</th>' for column in others)}</tr>"
    rows = ""
    for name, *cells in listing.rows:
        values = "".join(f"<td>{html.escape(cell).replace('  ', '&emsp;')}</td>" for cell in cells)
        rows += f"<tr><th>{html.escape(name)}</th>{values}</tr>"
    return (
        f"<h2>{html.escape(listing.title)}</h2><div class='wide'><table style='min-width:0;width:auto'>"
        f"{f'<thead>{head}</thead>' if any(listing.columns) else ''}<tbody>{rows}</tbody></table></div>"
    )
