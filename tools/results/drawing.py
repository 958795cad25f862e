"""Pictures of results pages: the differences of many presets."""

from __future__ import annotations

from collections.abc import Mapping
from math import copysign
from typing import TYPE_CHECKING, Any

from vlmattn.drawing import Figure, svg
from vlmattn.evals.report import bounds, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"better": "#009e73", "worse": "#d55e00", "": "#777777"}
_SIGN = {"higher": 1, "lower": -1}


def forest(summary: Mapping[str, Any]) -> str:
    """Headline differences to ``none`` with intervals as SVG: a line per preset, a panel per suite and condition.

    To the right is better in every panel. A panel ends where most presets are; arrows stand for those beyond.
    """
    presets = [preset for preset in summary["recipes"] if preset != "none"]
    panels = summary["overall"]
    figure = Figure(figsize=(2.2 + 2.4 * len(panels), 1.2 + 0.17 * len(presets)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, found in zip(axes, panels, strict=True):
        metric = summary["metrics"][found["suite"]][0]
        _panel(axis, {preset: found["rows"][preset]["metrics"][metric["name"]] for preset in presets}, metric["better"])
        axis.set_title(f"{found['suite']} {found['condition']}", fontsize=9)
        axis.set_xlabel(f"{metric['name']}, points\n({metric['better']} is better)", fontsize=8)
    axes[0].set_yticks(range(len(presets)), presets, fontsize=7)
    axes[0].set_ylim(len(presets) - 0.4, -0.6)
    return svg(figure)


def _panel(axis: Axes, cells: Mapping[str, Mapping[str, Any]], better: str) -> None:
    sign = _SIGN.get(better, 1)
    ends = [bounds(cell["difference"]) for cell in cells.values()]
    widths = sorted(high - low for low, high in filter(None, ends)) or [0.0]
    limit = 1.5 * max(widths[len(widths) * 9 // 10], 0.5)
    axis.axvline(0, color="#333", lw=0.8)
    for row, (cell, interval) in enumerate(zip(cells.values(), ends, strict=True)):
        difference, colour = cell["difference"], _COLOURS[verdict(cell, better)]
        if abs(difference["value"]) > limit:
            marker = ">" if (difference["value"] > 0) == (sign > 0) else "<"
            axis.plot(copysign(limit, difference["value"]), row, marker, ms=5, color=colour, clip_on=False)
            continue
        if interval is not None:
            axis.plot(interval, [row, row], "-", lw=1.2, color=colour)
        axis.plot(difference["value"], row, "o", ms=3, color=colour)
    axis.set_xlim(-limit * sign, limit * sign)
    axis.grid(axis="x", color="#ddd", lw=0.5)
    axis.tick_params(labelsize=7, length=2)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
