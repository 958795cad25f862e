"""HTML pages that need nothing from elsewhere: one style, figures and pictures inside."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmattn.errors import one_line

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#777777", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")

_STYLE = Path(__file__).with_name("pages.css").read_text(encoding="utf-8")
_LONE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: no file holds it
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Html(str):
    """Text that is HTML already, made by this library."""


def filled(template: str, parts: Mapping[str, Any]) -> str:
    """A template with each ``{{name}}`` replaced by its part, in one pass: what a part holds is never a place itself.

    Args:
        parts: ``Html`` enters as it is, any other string as text, everything else as JSON for a ``<script>`` element.

    Raises:
        KeyError: a place without a part.
    """
    return re.sub(r"\{\{(\w+)\}\}", lambda place: _entered(parts[place[1]]), template)


def _entered(part: Any) -> str:
    if isinstance(part, Html):
        return part
    if isinstance(part, str):
        return html.escape(part)
    text = _LONE.sub(_UNKNOWN, json.dumps(part, ensure_ascii=False, separators=(",", ":"), allow_nan=False))
    # without these letters nothing in it ends or begins an element, a comment or a line of a script
    return re.sub("[<>&\u2028\u2029]", lambda letter: f"\\u{ord(letter[0]):04x}", text)


def markdown_cell(text: str) -> str:
    """Text of a user as one cell of a Markdown table, or within a line: no HTML, no markup, no other cell."""
    cell = html.escape(one_line(text), quote=False)
    cell = re.sub(r"[\\`*|~$]|\](?=[(\[])", r"\\\g<0>", cell)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", cell)  # var_official stays as it is


def document(title: str, body: str) -> str:
    """A whole page; ``body`` is HTML. What no page may hold (NUL, half of a surrogate pair) becomes U+FFFD."""
    whole = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>
{body}</main></body></html>
"""
    return re.sub(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]", _UNKNOWN, _LONE.sub(_UNKNOWN, whole))


def figure(drawn: Any) -> str:
    """A matplotlib figure as SVG."""
    from vlmattn.drawing import svg

    text = svg(drawn)
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def image(picture: Any, longest: int = 336, least: int = 112) -> str:
    """A PIL image, made to fit; small ones grow without being smoothed."""
    shown = picture.copy()
    shown.thumbnail((longest, longest))
    if max(shown.size) < least:
        shown = shown.resize((least, least * shown.height // shown.width), resample=0)
    data = io.BytesIO()
    shown.save(data, format="PNG")
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}'>"


def heated(picture: Any, maps: Sequence[tuple[tuple[float, float, float, float], Any]]) -> Any:
    """A PIL image under maps: the redder, the higher, relative to the highest value that is drawn.

    Args:
        maps: boxes (left, top, right, bottom in shares of the picture), each with its map ``[rows, columns]``. Those of
            parts of the picture are drawn; if there are none, the finest map of the whole picture.
    """
    drawn = [(box, np.asarray(values, dtype=float)) for box, values in maps]
    parts = [drawn[number] for number in shown([box for box, _ in drawn], [values.size for _, values in drawn])]
    top = max(float(values.max()) for _, values in parts)
    mask = Image.new("L", picture.size)
    for (left, upper, right, lower), values in parts:
        (x, end), (y, bottom) = (
            [round(share * length) for share in shares]
            for shares, length in zip(((left, right), (upper, lower)), picture.size, strict=True)
        )
        share = Image.fromarray(np.uint8(0.6 * 255 * values / max(top, 1e-12)))
        if x < end and y < bottom:
            mask.paste(share.resize((end - x, bottom - y), Image.Resampling.NEAREST), (x, y))
    return Image.composite(Image.new("RGB", picture.size, "#d40000"), picture.convert("RGB"), mask)


def shown(boxes: Sequence[tuple[float, float, float, float]], cells: Sequence[int]) -> list[int]:
    """Which views are drawn over a picture, by number: those of its parts, else the finest of the whole.

    Args:
        boxes: of the views (left, top, right, bottom in shares of the picture). cells: how many each has.
    """
    parts = [number for number, box in enumerate(boxes) if tuple(box) != (0, 0, 1, 1)]
    return parts or sorted(range(len(boxes)), key=lambda number: cells[number])[-1:]
