"""Matplotlib figures of this library: names are drawn as they are, and a figure becomes the same bytes every time."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib import figure
from matplotlib.text import Text

from vlmattn.errors import one_line

_LONGEST = 80  # letters of a label; figures of longer ones have no room for anything else


class Figure(figure.Figure):  # type: ignore[misc]
    """A figure without markup: dollar signs in names of recipes, files and tokens begin no formula."""

    def draw(self, renderer: Any) -> None:
        """Draw; also what ``savefig`` calls."""
        self.make_plain()
        super().draw(renderer)

    def make_plain(self) -> None:
        """Let every text that is there now be drawn as it is, cut where it is too long."""
        for text in self.findobj(Text):
            text.set_parse_math(False)
            lines = text.get_text().split("\n")
            text.set_text("\n".join(one_line(line, _LONGEST) for line in lines[:2]))


def svg(drawn: figure.Figure) -> str:
    """A figure as SVG; the same figure has the same bytes."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "vlmattn"}):
        drawn.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue()
