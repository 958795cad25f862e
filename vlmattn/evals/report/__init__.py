"""A result for people: tables (tables.py), one HTML page (page.py) and its examples (gallery.py)."""

from vlmattn.evals.report.tables import (
    bounds,
    by_suite,
    change,
    markdown_tables,
    notes,
    p_value,
    spread,
    terminal_tables,
    verdict,
    whiskers,
)

__all__ = [
    "bounds", "by_suite", "change", "markdown_tables", "notes", "p_value", "spread", "terminal_tables", "verdict",
    "whiskers",
]  # fmt: skip
