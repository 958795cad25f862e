"""Writing pages and figures, whole or not at all."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError, one_line
from vlmattn.files import make_folder, write_whole

_DPI = 200


def write_page(target: Path, page: str) -> None:
    """Write an HTML page (``--html``)."""
    _write(target, page.encode(), "--html")


def write_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write matplotlib figures as PNG, by their names (``--png``)."""
    for title, figure in figures.items():
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=_DPI)
        name = re.sub(r"[^a-zA-Z0-9_-]", "_", one_line(title, 100))
        _write(folder / f"{name}.png", data.getvalue(), "--png")


def _write(target: Path, content: bytes, option: str) -> None:
    try:
        make_folder(target.parent)
        write_whole(target, content)
    except InputError as error:
        raise InputError(f"{error}; or give another {option}") from None
